// The product of many tokens with rows of a weight, in blocks that stay in the caches:
//
//   for each block of kBlockDepth values of k and kBlockRows rows
//     unpack the block, whatever its format
//     for each M vectors of tokens
//       for each R rows: multiply, with the R x M sums in registers
//
// The lanes of a vector are tokens; a value of a weight is broadcast to all of them. So weights
// need no other order than that of their file, and only activations are packed:
//
//   x [K / kBlockDepth, T / width, kBlockDepth / kDepth, width, kDepth]
//
// How R rows and M vectors are multiplied, and the sizes of the blocks, are a class of their own:
// VectorTile, or AmxTile in gemm_amx.h.
#pragma once

#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif
#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// With vectors. The weights of a block stay in the L2 cache, its activations of M vectors in L1.
template <class A>
struct VectorTile {
  using Element = typename A::Element;
  static constexpr int64_t kDepth = A::kDepth;
  // A block has 256 words of 4 bytes of each token or row.
  static constexpr int64_t kBlockDepth = 256 * kDepth;
  static constexpr int64_t kBlockTokens = 256;
  static constexpr int64_t kBlockRows = 96;  // a multiple of rows()
  // Rows of a task, a multiple of kBlockRows. A block of activations comes into the L2 cache once
  // for all of them: those of all tokens may not fit into the last-level cache.
  static constexpr int64_t kTaskRows = 2 * kBlockRows;

  // Vectors of tokens that are multiplied at a time, and the rows that go with them: as many as
  // leave the sums, the vectors and a broadcast value in registers.
  static constexpr int64_t kVectors = Vec::width == 1 ? 1 : 2;
  static constexpr int rows(int vectors) {
    return Vec::width == 1 ? 4 : Vec::width == 8 && vectors == 2 ? 6 : 12;
  }

  struct Setup {};

  // sums [M, R of kTaskRows, width] = (or, if not the first block of k, +=) products over `depth`
  // values, which are summed on their own: one running sum over thousands of values would lose
  // digits. `weights` and `sums` are those of all rows of a block, of which R begin at `row`.
  template <int R, int M>
  static void multiply(const Element* weights, int64_t row, const Element* x, int64_t stride_x,
                       int64_t depth, bool first, float* sums) {
    Vec tile[R][M];
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) tile[r][m] = broadcast(0.0f);
    }
    for (int64_t k = 0; k < depth; k += kDepth) {
      typename A::Operand tokens[M];
      for (int m = 0; m < M; ++m) tokens[m] = A::load(x + m * stride_x + k * Vec::width);
      for (int r = 0; r < R; ++r) {
        const auto weight = A::splat(weights + (row + r) * kBlockDepth + k);
        for (int m = 0; m < M; ++m) tile[r][m] = A::multiply_add(weight, tokens[m], tile[r][m]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) {
        float* sum = sums + (m * kTaskRows + row + r) * Vec::width;
        store(sum, first ? tile[r][m] : load(sum) + tile[r][m]);
      }
    }
  }
};

// For activations of type T.
template <class T>
struct TileOf {
  using type = VectorTile<typename ArithmeticOf<T>::type>;
};
#if defined(__AMX_BF16__)
template <>
struct TileOf<bf16> {
  using type = AmxTile;
};
#endif

// One task's sums, and the weights of a block.
template <class Tile>
struct ManyBuffers {
  // [tokens / width, rows, width], so that those of a tile are neighbours
  alignas(64) float sums[Tile::kBlockTokens * Tile::kTaskRows];
  alignas(64) typename Tile::Element weights[Tile::kBlockRows * Tile::kBlockDepth];
};

// Two vectors of values, in order.
MISTRAL_SIMD void put(float* out, Vec first, Vec second) {
  store(out, first);
  store(out + Vec::width, second);
}
#if defined(__AVX512BF16__)
MISTRAL_SIMD void put(bf16* out, Vec first, Vec second) {
  store_pairs(out, to_pairs(first, second));
}
#endif

// The rows that a task multiplies: those of one part of the weights, with SwiGLU of two.
struct TaskRows {
  WeightRows first, second;
  int64_t count;        // of all
  int64_t first_count;  // of the first

  WeightRows at(int64_t row) const {
    return row < first_count ? first.from(row) : second.from(row - first_count);
  }
};

constexpr int64_t kUnpacked = 8 * Vec::width;  // values of a row at a time

// Unpacks kUnpacked values of the first row from k on; those past K are 0. Those of int4 come in
// the order of Int4Chunk::k_at.
template <WeightFormat format, class T, class Element>
MISTRAL_SIMD void unpack(const WeightRows& w, int64_t k, Element* out) {
  constexpr int64_t kBytes = ChunkOf<format, T>::type::bytes(kUnpacked);
  if (k >= w.inputs) {
    memset(out, 0, kUnpacked * sizeof(Element));
    return;
  }
  const char* values = w.values + ChunkOf<format, T>::type::bytes(k);
  char rest[kBytes];
  if (k + kUnpacked > w.inputs) {
    const int64_t there = ChunkOf<format, T>::type::bytes(w.inputs - k);
    memcpy(rest, values, there);
    memset(rest + there, 0, kBytes - there);
    values = rest;
  }
  if constexpr (format == WeightFormat::int4) {
    const Words words = load_words(values);
    const GroupScales groups(w.group_log2, mistral::min(kUnpacked, w.inputs - k));
    const Vec scales =
        groups.of_chunk(groups.load(w.scales + (k >> w.group_log2) * kScaleBytes), 0);
    for (int i = 0; i < 8; i += 2) {
      put(out + i * Vec::width, int4_value(words, i) * scales, int4_value(words, i + 1) * scales);
    }
  } else if constexpr (format == WeightFormat::q8_0) {
    const int8_t* x = reinterpret_cast<const int8_t*>(values);
    const f16* scales = reinterpret_cast<const f16*>(w.scales);
    const int64_t last = w.inputs / 32 - 1;  // past it, values are zeros
    for (int i = 0; i < 8 * Vec::width; i += 2 * Vec::width) {
      const Vec scale = broadcast(scales[mistral::min((k + i) / 32, last)]);
      put(out + i, load(x + i) * scale, load(x + i + Vec::width) * scale);
    }
  } else if constexpr (format == WeightFormat::int8) {
    const int8_t* x = reinterpret_cast<const int8_t*>(values);
    const Vec scale = broadcast(to_float(*reinterpret_cast<const bf16*>(w.scales)));
    for (int i = 0; i < 8 * Vec::width; i += 2 * Vec::width) {
      put(out + i, load(x + i) * scale, load(x + i + Vec::width) * scale);
    }
  } else if constexpr (sizeof(T) == sizeof(Element)) {
    memcpy(out, values, kBytes);
  } else {
    const T* x = reinterpret_cast<const T*>(values);
    for (int i = 0; i < 8 * Vec::width; i += 2 * Vec::width) {
      put(out + i, load(x + i), load(x + i + Vec::width));
    }
  }
}

// All rows of a block, M vectors of tokens. Calls before_tile(row, rows) before each tile.
template <class Tile, int M, class BeforeTile>
void multiply_vectors(const typename Tile::Element* weights, int64_t rows,
                      const typename Tile::Element* x, int64_t stride_x, int64_t depth, bool first,
                      float* sums, const BeforeTile& before_tile) {
  constexpr int R = Tile::rows(M);
  static_assert(Tile::kBlockRows % R == 0, "");
  for (int64_t row = 0; row < rows; row += R) {
    before_tile(row, R);
    Tile::template multiply<R, M>(weights, row, x, stride_x, depth, first, sums);
  }
}

// Adds to (or, at the beginning of k, sets) the sums of a block: of the rows from first_row on and
// the values from `begin` on, with all tokens of the task. x: those of its tokens.
// first_sum: the row of the sums where those of `rows` begin
template <WeightFormat format, class T, class Tile>
void multiply_block(const TaskRows& rows, int64_t first_row, int64_t first_sum, int64_t begin,
                    int64_t depth, const typename Tile::Element* x, int64_t vectors,
                    ManyBuffers<Tile>& buffers) {
  using Chunk = typename ChunkOf<format, T>::type;
  const int64_t count = mistral::min(Tile::kBlockRows, rows.count - first_row);
  for (int64_t row = 0; row < count; ++row) {
    const WeightRows w = rows.at(first_row + row);
    for (int64_t k = 0; k < depth; k += kUnpacked) {
      unpack<format, T>(w, begin + k, buffers.weights + row * Tile::kBlockDepth + k);
    }
  }

  // The next values of these rows are fetched a little before each tile, because rows are too far
  // apart and what is read of them too short for the processor to see what is coming.
  const int64_t next = Chunk::bytes(begin + depth);
  const int64_t next_bytes =
      mistral::min(Chunk::bytes(Tile::kBlockDepth), rows.first.row_bytes - next);
  const int64_t steps = ceil_div(vectors, Tile::kVectors);
  const int64_t step_bytes = ceil_div(ceil_div(next_bytes, steps), 64) * 64;

  const int64_t stride_x = depth * Vec::width;
  for (int64_t vector = 0; vector < vectors; vector += Tile::kVectors) {
    const int64_t from_byte = vector / Tile::kVectors * step_bytes;
    const int64_t to_byte = mistral::min(from_byte + step_bytes, next_bytes);
    const auto fetch = [&](int64_t row, int64_t tile_rows) {
      for (int64_t r = row; r < mistral::min(row + tile_rows, count); ++r) {
        const char* values = rows.at(first_row + r).values + next;
        for (int64_t byte = from_byte; byte < to_byte; byte += 64) {
          __builtin_prefetch(values + byte, 0, 2);  // into the L2 cache
        }
      }
    };
    const auto* from = x + vector * stride_x;
    float* sums = buffers.sums + (vector * Tile::kTaskRows + first_sum + first_row) * Vec::width;
    const bool first = begin == 0;
    if (vector + Tile::kVectors <= vectors) {
      multiply_vectors<Tile, Tile::kVectors>(buffers.weights, count, from, stride_x, depth, first,
                                             sums, fetch);
    } else {
      multiply_vectors<Tile, 1>(buffers.weights, count, from, stride_x, depth, first, sums, fetch);
    }
  }
}

// buffers.sums, from row first_sum on, = the products of up to kTaskRows rows and up to
// kBlockTokens tokens, which are `vectors` of the packed x's all_vectors, from first_vector on. The
// rows of sums after them, as far as a tile goes, lose what they have.
template <WeightFormat format, class T, class Tile>
void multiply_many(const TaskRows& rows, int64_t first_sum, const typename Tile::Element* x,
                   int64_t all_vectors, int64_t first_vector, int64_t vectors,
                   ManyBuffers<Tile>& buffers) {
  [[maybe_unused]] typename Tile::Setup setup;
  const int64_t inputs = padded(rows.first.inputs);
  if (inputs == 0) memset(buffers.sums, 0, sizeof buffers.sums);  // no block sets them
  // The last tile of rows may go beyond them.
  for (int64_t row = rows.count; row < Tile::kBlockRows; ++row) {
    memset(buffers.weights + row * Tile::kBlockDepth, 0,
           Tile::kBlockDepth * sizeof(typename Tile::Element));
  }
  for (int64_t begin = 0; begin < inputs; begin += Tile::kBlockDepth) {
    const int64_t depth = mistral::min(Tile::kBlockDepth, inputs - begin);
    const auto* block = x + (begin * all_vectors + first_vector * depth) * Vec::width;
    for (int64_t row = 0; row < rows.count; row += Tile::kBlockRows) {
      multiply_block<format, T>(rows, row, first_sum, begin, depth, block, vectors, buffers);
    }
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

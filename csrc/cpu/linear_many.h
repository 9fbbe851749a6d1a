// The product of many tokens with rows of a weight, in blocks that stay in the caches:
//
//   for each block of kBlockDepth values of k
//     unpack the block of all rows into the L2 cache, whatever their format
//     for each M vectors of tokens (their block stays in the L1 cache)
//       for each R rows: multiply, with the R x M sums in registers
//
// The lanes of a vector are tokens; a value of a weight is broadcast to all of them. So weights
// need no other order than that of their file, and only activations are packed:
//
//   x [K / kBlockDepth, T / width, kBlockDepth / kDepth, width, kDepth]
#pragma once

#include "linear_formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// A block of activations or of weights has 256 words of 4 bytes of each token or row.
template <class A>
constexpr int64_t kBlockDepth = 256 * A::kDepth;
constexpr int64_t kBlockTokens = 256;
constexpr int64_t kBlockRows = 96;  // a multiple of all tile_rows

// Vectors of tokens that are multiplied at a time, and the rows that go with them: as many as leave
// the sums, the vectors and a broadcast value in registers.
constexpr int64_t kTileVectors = Vec::width == 1 ? 1 : 2;
constexpr int tile_rows(int vectors) {
  return Vec::width == 1 ? 4 : Vec::width == 8 && vectors == 2 ? 6 : 12;
}

// One task's weights and sums.
template <class A>
struct ManyBuffers {
  alignas(64) float sums[kBlockRows * kBlockTokens];  // [rows, tokens]
  alignas(64) typename A::Element weights[kBlockRows * kBlockDepth<A>];
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
    const Vec scales = w.load_scales(GroupScales(w.group_log2), 0, k, kUnpacked);
    for (int i = 0; i < 8; i += 2) {
      put(out + i * Vec::width, int4_value(words, i) * scales, int4_value(words, i + 1) * scales);
    }
  } else if constexpr (format == WeightFormat::int8) {
    const int8_t* x = reinterpret_cast<const int8_t*>(values);
    const Vec scale = broadcast(to_float(*w.scales));
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

// sums [R, M vectors] = (or, if not the first block of k, +=) products over `depth` values, which
// are summed on their own: one running sum over thousands of values would lose digits.
template <class A, int R, int M>
void multiply_tile(const typename A::Element* weights, const typename A::Element* x,
                   int64_t stride_x, int64_t depth, bool first, float* sums) {
  Vec tile[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) tile[r][m] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; k += A::kDepth) {
    typename A::Operand tokens[M];
    for (int m = 0; m < M; ++m) tokens[m] = A::load(x + m * stride_x + k * Vec::width);
    for (int r = 0; r < R; ++r) {
      const auto weight = A::splat(weights + r * kBlockDepth<A> + k);
      for (int m = 0; m < M; ++m) tile[r][m] = A::multiply_add(weight, tokens[m], tile[r][m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float* sum = sums + r * kBlockTokens + m * Vec::width;
      store(sum, first ? tile[r][m] : load(sum) + tile[r][m]);
    }
  }
}

// All rows of a task, M vectors of tokens. Calls before_tile(row, rows) before each tile.
template <class A, int M, class BeforeTile>
void multiply_vectors(const ManyBuffers<A>& buffers, int64_t rows, const typename A::Element* x,
                      int64_t stride_x, int64_t depth, bool first, float* sums,
                      const BeforeTile& before_tile) {
  constexpr int R = tile_rows(M);
  for (int64_t row = 0; row < rows; row += R) {
    before_tile(row, R);
    multiply_tile<A, R, M>(buffers.weights + row * kBlockDepth<A>, x, stride_x, depth, first,
                           sums + row * kBlockTokens);
  }
}

// buffers.sums [rows, tokens] = the products of up to kBlockRows rows and up to kBlockTokens
// tokens, which are `vectors` of the packed x's all_vectors, from first_vector on.
template <WeightFormat format, class T, class A>
void multiply_many(const TaskRows& rows, const typename A::Element* x, int64_t all_vectors,
                   int64_t first_vector, int64_t vectors, ManyBuffers<A>& buffers) {
  const int64_t inputs = padded(rows.first.inputs);
  // The last tile of rows may go beyond them.
  memset(buffers.weights + rows.count * kBlockDepth<A>, 0,
         (kBlockRows - rows.count) * kBlockDepth<A> * sizeof(typename A::Element));
  for (int64_t begin = 0; begin < inputs; begin += kBlockDepth<A>) {
    const int64_t depth = mistral::min(kBlockDepth<A>, inputs - begin);
    for (int64_t row = 0; row < rows.count; ++row) {
      const WeightRows w = rows.at(row);
      for (int64_t k = 0; k < depth; k += kUnpacked) {
        unpack<format, T>(w, begin + k, buffers.weights + row * kBlockDepth<A> + k);
      }
    }

    // The next block of the weights is fetched a little before each tile, because its rows are too
    // far apart and too short for the processor to see what is coming.
    const int64_t next = ChunkOf<format, T>::type::bytes(begin + depth);
    const int64_t next_bytes =
        mistral::min(ChunkOf<format, T>::type::bytes(kBlockDepth<A>), rows.first.row_bytes - next);
    const int64_t steps = ceil_div(vectors, kTileVectors);
    const int64_t step_bytes = ceil_div(ceil_div(next_bytes, steps), 64) * 64;

    const int64_t stride_x = depth * Vec::width;
    const auto* block = x + begin * all_vectors * Vec::width + first_vector * stride_x;
    for (int64_t vector = 0; vector < vectors; vector += kTileVectors) {
      const int64_t from_byte = vector / kTileVectors * step_bytes;
      const int64_t to_byte = mistral::min(from_byte + step_bytes, next_bytes);
      const auto fetch = [&](int64_t row, int64_t count) {
        for (int64_t r = row; r < mistral::min(row + count, rows.count); ++r) {
          const char* values = rows.at(r).values + next;
          for (int64_t byte = from_byte; byte < to_byte; byte += 64) {
            __builtin_prefetch(values + byte, 0, 2);  // into the L2 cache
          }
        }
      };
      const auto* from = block + vector * stride_x;
      float* sums = buffers.sums + vector * Vec::width;
      const bool first = begin == 0;
      if (vector + kTileVectors <= vectors) {
        multiply_vectors<A, kTileVectors>(buffers, rows.count, from, stride_x, depth, first, sums,
                                          fetch);
      } else {
        multiply_vectors<A, 1>(buffers, rows.count, from, stride_x, depth, first, sums, fetch);
      }
    }
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

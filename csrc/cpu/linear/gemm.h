// The product of many tokens with rows of a weight, in blocks that stay in the caches:
//
//   for each block of kBlockDepth values of k and kBlockRows rows
//     unpack the block, whatever its format
//     for each M vectors of tokens
//       for each R rows: multiply, with the R x M sums in registers
//
// With up to kFewTokens tokens, memory limits the speed. All of k is then multiplied for kFewRows
// rows before the next rows, so that memory is read along rows and prefetched kAheadBytes ahead.
//
// The lanes of a vector are tokens, and each value of a weight is broadcast to all lanes. So
// weights stay in the order of their file, and only activations are packed:
//
//   x [K / kBlockDepth, T / width, kBlockDepth / kDepth, width, kDepth]
//
// A tile class multiplies R rows by M vectors and sets the sizes of the blocks: VectorTile here, or
// AmxTile in gemm_amx.h.
#pragma once

#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif
#include "gemv.h"
#include "unpack.h"

namespace mistral::cpu::MISTRAL_ISA {

// Multiplies with vector instructions. The weights of a block stay in the L2 cache, the activations
// of M vectors in L1.
template <class A>
struct VectorTile {
  using Element = typename A::Element;
  static constexpr int64_t kDepth = A::kDepth;
  // A block holds 256 words of 4 bytes of each token or row.
  static constexpr int64_t kBlockDepth = 256 * kDepth;
  static constexpr int64_t kBlockTokens = 256;
  static constexpr int64_t kBlockRows = 96;  // a multiple of rows()
  // Rows of a task, a multiple of kBlockRows. A block of activations is brought into the L2 cache
  // once for all of these rows, because the activations of all tokens may not fit the last-level
  // cache.
  static constexpr int64_t kTaskRows = 2 * kBlockRows;
  static constexpr int64_t kFewTokens = 64;
  static constexpr int64_t kFewRows = 24;  // a multiple of rows()

  // How many vectors of tokens, and how many rows, are multiplied at a time: as many as leave room
  // in the registers for the sums, the vectors and a broadcast value.
  static constexpr int64_t kVectors = Vec::width == 1 ? 1 : 2;
  static constexpr int rows(int vectors) {
    return Vec::width == 1 ? 4 : Vec::width == 8 && vectors == 2 ? 6 : 12;
  }

  struct Setup {};

  // sums [M, R of kTaskRows, width] = the products over `depth` values if this is the first block
  // of k; otherwise adds them to `sums`. A block is summed on its own, because one running sum over
  // thousands of values would lose digits. `weights` and `sums` belong to all rows of a block; the
  // R rows begin at `row`.
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

// The tile class for activations of type T.
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
  // [tokens / width, rows, width], so that the sums of a tile are neighbours
  alignas(64) float sums[Tile::kBlockTokens * Tile::kTaskRows];
  alignas(64) typename Tile::Element weights[Tile::kBlockRows * Tile::kBlockDepth];
};

// The rows that a task multiplies: rows of one part of the weights, or with SwiGLU of both parts.
struct TaskRows {
  WeightRows first, second;
  int64_t count;        // of all
  int64_t first_count;  // of the first

  WeightRows at(int64_t row) const {
    return row < first_count ? first.from(row) : second.from(row - first_count);
  }
};

// Multiplies all rows of a block by M vectors of tokens. Calls before_tile(row, rows) before each
// tile.
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

// The values that are multiplied after those of a block, to be prefetched meanwhile.
struct NextValues {
  int64_t first_row;
  int64_t count;  // rows
  int64_t begin;  // bytes of a row
  int64_t bytes;
};

// Multiplies one block by all tokens of the task. The block has `count` rows from first_row on, and
// the values from `begin` on. Adds to the sums, or sets them if `begin` is 0. `x` holds the packed
// activations of the block. first_sum is the row of buffers.sums where the sums of `rows` begin.
template <class Tile>
void multiply_block(const TaskRows& rows, Unpack<typename Tile::Element> unpack, int64_t first_row,
                    int64_t count, int64_t first_sum, int64_t begin, int64_t depth,
                    const NextValues& next, const typename Tile::Element* x, int64_t vectors,
                    ManyBuffers<Tile>& buffers) {
  for (int64_t row = 0; row < count; ++row) {
    const WeightRows w = rows.at(first_row + row);
    for (int64_t k = 0; k < depth; k += kUnpacked) {
      unpack(w, begin + k, buffers.weights + row * Tile::kBlockDepth + k);
    }
  }

  // Before each tile, a share of the next values is prefetched. The hardware does not prefetch
  // them, because rows are far apart and a block reads few bytes of each.
  const int64_t steps = ceil_div(vectors, Tile::kVectors);
  const int64_t step_bytes = ceil_div(ceil_div(next.bytes, steps), 64) * 64;

  const int64_t stride_x = depth * Vec::width;
  for (int64_t vector = 0; vector < vectors; vector += Tile::kVectors) {
    const int64_t from_byte = vector / Tile::kVectors * step_bytes;
    const int64_t to_byte = mistral::min(from_byte + step_bytes, next.bytes);
    const auto fetch = [&](int64_t row, int64_t tile_rows) {
      for (int64_t r = row; r < mistral::min(row + tile_rows, next.count); ++r) {
        const char* values = rows.at(next.first_row + r).values + next.begin;
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

// Multiplies up to kTaskRows rows by up to kBlockTokens tokens. These are `vectors` vectors from
// first_vector on; the packed x has all_vectors. Writes buffers.sums from row first_sum on. The
// last tile may overwrite rows of the sums past `rows`.
template <class Tile>
void multiply_many(const TaskRows& rows, Unpack<typename Tile::Element> unpack, int64_t first_sum,
                   const typename Tile::Element* x, int64_t all_vectors, int64_t first_vector,
                   int64_t vectors, ManyBuffers<Tile>& buffers) {
  [[maybe_unused]] typename Tile::Setup setup;
  const int64_t inputs = padded(rows.first.inputs);
  if (inputs == 0) memset(buffers.sums, 0, sizeof buffers.sums);  // no block sets them
  // The last tile may reach past the rows; it multiplies zeros there.
  for (int64_t row = rows.count; row < Tile::kBlockRows; ++row) {
    memset(buffers.weights + row * Tile::kBlockDepth, 0,
           Tile::kBlockDepth * sizeof(typename Tile::Element));
  }
  const bool along_rows = vectors * Vec::width <= Tile::kFewTokens;
  const int64_t most = along_rows ? Tile::kFewRows : Tile::kBlockRows;
  const int64_t blocks = ceil_div(inputs, Tile::kBlockDepth);
  const int64_t block_bytes = rows.first.bytes(Tile::kBlockDepth);
  const auto count_from = [&](int64_t row) {
    return mistral::max(int64_t{0}, mistral::min(most, rows.count - row));
  };
  // What is prefetched. Along rows, it is a block so far ahead that kAheadBytes are on their way;
  // past the end of the rows the next rows begin.
  const int64_t ahead = along_rows ? ceil_div(kAheadBytes, most * block_bytes) : 1;
  const auto next_of = [&](int64_t row, int64_t block) {
    const int64_t next = block + ahead;
    const int64_t first = along_rows ? row + next / blocks * most : row;
    const int64_t begin = (along_rows ? next % blocks : next) * block_bytes;
    return NextValues{first, count_from(first), begin,
                      mistral::min(block_bytes, rows.first.row_bytes - begin)};
  };
  const auto multiply = [&](int64_t row, int64_t block) {
    const int64_t begin = block * Tile::kBlockDepth;
    const int64_t depth = mistral::min(Tile::kBlockDepth, inputs - begin);
    const auto* from = x + (begin * all_vectors + first_vector * depth) * Vec::width;
    multiply_block(rows, unpack, row, count_from(row), first_sum, begin, depth, next_of(row, block),
                   from, vectors, buffers);
  };
  if (along_rows) {
    for (int64_t row = 0; row < rows.count; row += most) {
      for (int64_t block = 0; block < blocks; ++block) multiply(row, block);
    }
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = 0; row < rows.count; row += most) multiply(row, block);
    }
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

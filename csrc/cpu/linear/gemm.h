// The product of many tokens with rows of a weight, in blocks that stay in the caches:
//
//   for each block of kBlockDepth values of k and kBlockRows rows
//     unpack the block, whatever its format
//     for each M vectors of tokens, at most kVectors
//       for each R = rows(M) rows: multiply, with the R x M sums in registers
//
// With up to kFewTokens tokens, memory limits the speed. Then kFewRows rows are multiplied over all
// of k before the next rows. This way memory is read along rows, and prefetched kAheadBytes ahead.
//
// The lanes of a vector are tokens, and each value of a weight is broadcast to all lanes. So
// weights stay in the order of memory, and only activations are packed:
//
//   x [K / kBlockDepth, T / width, kBlockDepth / kDepth, width, kDepth]
//
// Here K is the number of values of a token and T the number of tokens, both padded with zeros. A
// vector has `width` lanes. kDepth is 2 if pairs of bf16 are multiplied, else 1 (arithmetic.h).
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

// Multiplies with vector instructions. The weights of a block (96 KB) stay in the L2 cache. The
// activations of M vectors (at most 32 KB) stay in L1.
template <class A>
struct VectorTile {
  using Element = typename A::Element;
  static constexpr int64_t kDepth = A::kDepth;
  // The number of values of k in a block: 1 KB of each row and token.
  static constexpr int64_t kBlockDepth = 256 * kDepth;
  static constexpr int64_t kBlockTokens = 256;
  static constexpr int64_t kBlockRows = 96;  // a multiple of rows()
  // The number of rows of a task, a multiple of kBlockRows. The activations of all tokens may not
  // fit the last-level cache. So a block of activations is brought into the L2 cache once and used
  // for all these rows.
  static constexpr int64_t kTaskRows = 2 * kBlockRows;
  static constexpr int64_t kFewTokens = 64;
  static constexpr int64_t kFewRows = 24;  // a multiple of rows()

  // The number of token vectors, and of rows, that are multiplied at a time. The sums, the vectors
  // and a broadcast value must fit the registers.
  static constexpr int64_t kVectors = Vec::width == 1 ? 1 : 2;
  static constexpr int rows(int vectors) {
    return Vec::width == 1 ? 4 : Vec::width == 8 && vectors == 2 ? 6 : 12;
  }

  struct Setup {};

  // Computes the products over `depth` values of k, for R rows from `row` on and M vectors of
  // tokens. `first` says whether this is the first block of k. If so, the products are written to
  // `sums` [M, kTaskRows, width], else added to them. Each block is summed on its own first,
  // because one running sum over thousands of values would lose digits. `weights` and `sums` begin
  // at row 0 of the block, not at `row`.
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

// The sums of a task, and the unpacked weights of a block.
template <class Tile>
struct ManyBuffers {
  // [tokens / width, rows, width], so that the sums of a tile are neighbours
  alignas(64) float sums[Tile::kBlockTokens * Tile::kTaskRows];
  alignas(64) typename Tile::Element weights[Tile::kBlockRows * Tile::kBlockDepth];
};

// The rows of a task. They belong to one part of the weights (linear.h) or, with SwiGLU, to two.
struct TaskRows {
  WeightRows first, second;
  int64_t count;        // the number of rows of `first` and `second` together
  int64_t first_count;  // the number of rows of `first`

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

// The weights that are prefetched while a block is multiplied.
struct NextValues {
  int64_t first_row;
  int64_t count;  // the number of rows
  int64_t begin;  // the first byte within a row
  int64_t bytes;  // the number of bytes of each row
};

// Multiplies one block of weights by `vectors` vectors of tokens. The block has rows [first_row,
// first_row + count) of the task, and `depth` values of each row, from `begin` on. Adds to the
// sums, or sets them if `begin` is 0. The sums of row i of the task are in row first_sum + i of
// buffers.sums. `x` points to the packed activations for these values. Meanwhile prefetches `next`.
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

  // Before each tile a share of `next` is prefetched. The hardware does not prefetch these weights,
  // because rows are far apart and a block has few bytes of each row.
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

// Multiplies up to kTaskRows rows by up to kBlockTokens tokens. The packed x has all_vectors
// vectors of tokens, of which this call takes `vectors`, from first_vector on. Writes buffers.sums
// from row first_sum on. May also overwrite sums after those of `rows`, up to the end of the last
// tile.
template <class Tile>
void multiply_many(const TaskRows& rows, Unpack<typename Tile::Element> unpack, int64_t first_sum,
                   const typename Tile::Element* x, int64_t all_vectors, int64_t first_vector,
                   int64_t vectors, ManyBuffers<Tile>& buffers) {
  [[maybe_unused]] typename Tile::Setup setup;
  const int64_t inputs = padded(rows.first.inputs);
  if (inputs == 0) memset(buffers.sums, 0, sizeof buffers.sums);  // no block sets the sums
  // The last tile may reach past the rows. There it multiplies zeros, or rows of an earlier block,
  // and the sums are not used.
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
  // Finds the weights to prefetch. If `along_rows`, they lie kAheadBytes ahead in the same rows or,
  // past the end of these rows, in the next rows. Otherwise they are the next block of k of the
  // same rows.
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

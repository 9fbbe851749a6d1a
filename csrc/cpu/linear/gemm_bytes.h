// The product of many tokens with rows of a weight, in bytes (byte_chunk.h). Each output is
// computed by the same additions in the same order as in gemv_bytes.h. So a token gets the same
// bits with any number of other tokens, as long as the products are in bytes.
//
//   for each kPanelRows rows, for each block of kPanelChunks chunks of k
//     unpack the block once for all tokens: the panel
//     for each 4 tokens, for each group of rows: add the products of the block
//
// The sum of an output stays a vector until all of k is added. The panel and the sums of its rows
// stay in the L2 cache. The activations of 4 tokens (with i8mm of 4 pairs of tokens, each packed
// together) stay in L1.
//
// AVX-512 with VNNI has another panel (gemm_bytes_512.h). There fewer than kFewest tokens are
// multiplied as by gemv, because making the panel would take longer than it saves.
#pragma once

#include "gemv_bytes.h"

namespace mistral::cpu::MISTRAL_ISA {

// Rows of one part of the weights, and the packed activations of some tokens.
struct ByteProducts {
  WeightRows w;
  int64_t rows;
  const char* x;
  int64_t stride_x;  // bytes from token to token
  int64_t tokens;
};

// The destination of the products: [tokens / width, width, rows].
struct ProductsOut {
  float* sums;
  int64_t stride_vector;  // floats from one vector of tokens to the next
  int64_t rows;           // floats from token to token within a vector

  float* of_token(int64_t token) const {
    return sums + token / Vec::width * stride_vector + token % Vec::width * rows;
  }
};

// The most tokens of a task.
constexpr int64_t kPanelTokens = 256;

template <WeightFormat format>
class BytePanel;

#if defined(MISTRAL_VECTORS) && !defined(__AVX512VNNI__)

template <WeightFormat format>
class BytePanel {
 public:
  // Multiplies up to kPanelTokens tokens.
  static void multiply(const ByteProducts& p, const ProductsOut& out) {
    BytePanel panel;
    for (int64_t row = 0; row < p.rows; row += kPanelRows) {
      panel.multiply_rows(p, row, mistral::min(kPanelRows, p.rows - row), out);
    }
  }

 private:
  using Chunk = ByteChunk<format>;
  using Sums = typename Chunk::Sums;
  static constexpr int R = Chunk::kRows;
  static constexpr int64_t M = Chunk::kTokens;
  static constexpr int64_t kPanelRows = 16;
  static constexpr int64_t kPanelChunks = 8;
  static constexpr int kColumns = 4;

  void multiply_rows(const ByteProducts& p, int64_t first, int64_t rows, const ProductsOut& out) {
    const int64_t groups = ceil_div(rows, R), columns = ceil_div(p.tokens, M);
    for (int64_t i = 0; i < groups; ++i) {
      memset(totals_[i], 0, ceil_div(columns, 8) * 8 * sizeof(Sums));
    }
    const int64_t chunks = ceil_div(p.w.inputs, kSuperBlock);
    for (int64_t begin = 0; begin < chunks; begin += kPanelChunks) {
      const int64_t count = mistral::min(kPanelChunks, chunks - begin);
      unpack(p.w.from(first), rows, begin, count);
      const char* x = p.x + begin * M * Chunk::kLineBytes;
      const int64_t stride = M * p.stride_x;
      int64_t column = 0;
      for (; column + kColumns <= columns; column += kColumns) {
        add_columns<kColumns>(x + column * stride, stride, column, groups, count);
      }
      for (; column < columns; ++column) {
        add_columns<1>(x + column * stride, stride, column, groups, count);
      }
    }
    for (int64_t i = 0; i < groups; ++i) {
      for (int64_t column = 0; column < columns; column += 8) {
        Sums of_columns[8];
        memcpy(of_columns, totals_[i] + column, sizeof of_columns);
        float sums[8][R][M];
        Chunk::store_sums(of_columns, 1.0f, sums[0][0]);
        for (int64_t r = 0; r < mistral::min(int64_t{R}, rows - i * R); ++r) {
          for (int t = 0; t < 8 * M; ++t) {
            out.of_token(column * M + t)[first + i * R + r] = sums[t / M][r][t % M];
          }
        }
      }
    }
  }

  // Unpacks a block into the panel. Meanwhile prefetches the next block of the same rows, or the
  // first block of the next rows.
  void unpack(const WeightRows& w, int64_t rows, int64_t begin, int64_t count) {
    const bool last = (begin + count) * kSuperBlock >= w.inputs;
    const char* next =
        last ? w.from(kPanelRows).values : w.values + (begin + count) * Chunk::kBytes;
    for (int64_t row = 0; row < rows; row += R) {
      const WeightRows from = w.from(row);
      for (int64_t i = 0; i < count; ++i) {
        for (int r = 0; r < R; ++r) {
          fetch<2>(next + (row + r) * w.row_bytes + i * Chunk::kBytes, Chunk::kBytes);
        }
        take_chunk(from, rows - row, begin + i, chunks_[row / R][i]);
      }
    }
  }

  template <int N>
  void add_columns(const char* x, int64_t stride, int64_t column, int64_t groups, int64_t count) {
    for (int64_t i = 0; i < groups; ++i) {
      Sums sums[N];
      for (int n = 0; n < N; ++n) sums[n] = totals_[i][column + n];
      for (int64_t j = 0; j < count; ++j) {
        add_chunk<N>(chunks_[i][j], x + j * M * Chunk::kLineBytes, stride, sums);
      }
      for (int n = 0; n < N; ++n) totals_[i][column + n] = sums[n];
    }
  }

  // The first index is a group of kRows rows, which share a chunk. The second index of totals_ is a
  // column, which is kTokens tokens that are packed together. The second index of chunks_ is a
  // chunk of the block.
  Sums totals_[kPanelRows / R][kPanelTokens / M];
  Chunk chunks_[kPanelRows / R][kPanelChunks];
};

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

#if defined(__AVX512VNNI__)
#include "gemm_bytes_512.h"
#endif

namespace mistral::cpu::MISTRAL_ISA {

// Multiplies up to kPanelTokens tokens.
template <WeightFormat format>
void multiply_many_bytes([[maybe_unused]] const ByteProducts& p,
                         [[maybe_unused]] const ProductsOut& out) {
  if constexpr (has_bytes(format)) {
#if defined(__AVX512VNNI__)
    if (p.tokens >= RowsPanel<format>::kFewest) return RowsPanel<format>::multiply(p, out);
    static_assert(Vec::width <= kChunkTokens, "");
    using Few = FewInChunks<ByteChunk<format>>;
    for (int64_t row = 0; row < p.rows; row += Few::kGroup) {
      const int64_t rows = mistral::min(Few::kGroup, p.rows - row);
      for (int64_t token = 0; token < p.tokens; token += Vec::width) {
        const int64_t tokens = mistral::min(int64_t{Vec::width}, p.tokens - token);
        Few::multiply(p.w.from(row), rows, p.x + token * p.stride_x, p.stride_x, tokens,
                      out.of_token(token) + row, out.rows);
      }
    }
#else
    BytePanel<format>::multiply(p, out);
#endif
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

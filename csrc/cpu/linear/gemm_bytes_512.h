// The part of gemm_bytes.h for AVX-512 with VNNI: rows lie in the lanes of vectors
// (byte_rows_512.h). The panel stays in the L1 cache. The activations of 4 tokens and their sums
// pass by.
#pragma once

#include "byte_rows_512.h"

namespace mistral::cpu::MISTRAL_ISA {

template <WeightFormat format>
class BytePanel {
 public:
  // Multiplies up to kPanelTokens tokens.
  static void multiply(const ByteProducts& p, const ProductsOut& out) {
    BytePanel panel;
    for (int64_t row = 0; row < p.rows; row += Rows::kRows) {
      panel.multiply_rows(p, row, mistral::min(int64_t{Rows::kRows}, p.rows - row), out);
    }
  }

 private:
  using Rows = ByteRows<format>;
  static constexpr int64_t kPanelChunks = 2;
  static constexpr int64_t kBytes = ByteFormat<format>::kBytes;

  void multiply_rows(const ByteProducts& p, int64_t first, int64_t rows, const ProductsOut& out) {
    memset(totals_, 0, p.tokens * sizeof totals_[0]);
    const int64_t chunks = ceil_div(p.w.inputs, kSuperBlock);
    for (int64_t begin = 0; begin < chunks; begin += kPanelChunks) {
      const int64_t count = mistral::min(kPanelChunks, chunks - begin);
      unpack(p.w.from(first), rows, begin, count);
      const char* x = p.x + begin * int64_t{sizeof(ByteActivations)};
      constexpr int N = Rows::kTokens;
      int64_t token = 0;
      for (; token + N <= p.tokens; token += N) add_tokens<N>(x, p.stride_x, token, count);
      for (; token < p.tokens; ++token) add_tokens<1>(x, p.stride_x, token, count);
    }
    for (int64_t token = 0; token < p.tokens; ++token) {
      float* sums = out.of_token(token) + first;
      for (int64_t row = 0; row < rows; row += 16) {
        store_first(sums + row, Rows::sums_of(totals_[token], row / 16),
                    mistral::min(int64_t{16}, rows - row));
      }
    }
  }

  // Meanwhile prefetches the next block, of the same rows or of the rows after them.
  void unpack(const WeightRows& w, int64_t rows, int64_t begin, int64_t count) {
    const bool last = (begin + count) * kSuperBlock >= w.inputs;
    const char* next = last ? w.from(Rows::kRows).values : w.values + (begin + count) * kBytes;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t row = 0; row < rows; ++row) {
        fetch<2>(next + row * w.row_bytes + i * kBytes, kBytes);
      }
      chunks_[i].take(w, rows, begin + i);
    }
  }

  template <int N>
  void add_tokens(const char* x, int64_t stride_x, int64_t token, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      chunks_[i].template add<N>(x + token * stride_x + i * int64_t{sizeof(ByteActivations)},
                                 stride_x, totals_ + token);
    }
  }

  typename Rows::Totals totals_[kPanelTokens];
  Rows chunks_[kPanelChunks];
};

}  // namespace mistral::cpu::MISTRAL_ISA

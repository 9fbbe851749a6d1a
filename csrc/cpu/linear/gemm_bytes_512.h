// The part of gemm_bytes.h for AVX-512 with VNNI. Rows lie in the lanes of vectors
// (byte_rows_512.h).
//
//   for each kPanelRows rows, for each block of kPanelChunks chunks of k, for each 32 of the rows
//     unpack their block: it stays in the L1 cache
//     for each 4 tokens: add the products of the block
//
// The activations of the block and the sums of the rows stay in the L2 cache.
#pragma once

#include "byte_rows_512.h"

namespace mistral::cpu::MISTRAL_ISA {

template <WeightFormat format>
class RowsPanel {
 public:
  // The fewest tokens for which a panel is made. With fewer tokens, rearranging the rows takes
  // longer than it saves.
  static constexpr int64_t kFewest = ByteFormat<format>::kBits == 4 ? 17 : 28;

  // Multiplies up to kPanelTokens tokens.
  static void multiply(const ByteProducts& p, const ProductsOut& out) {
    RowsPanel panel;
    for (int64_t row = 0; row < p.rows; row += kPanelRows) {
      panel.multiply_rows(p, row, mistral::min(kPanelRows, p.rows - row), out);
    }
  }

 private:
  using Rows = ByteRows<format>;
  static constexpr int64_t kRows = Rows::kRows;
  static constexpr int64_t kPanelRows = 3 * kRows;
  static constexpr int64_t kPanelChunks = 2;
  static constexpr int64_t kChunkBytes = ByteFormat<format>::kBytes;

  void multiply_rows(const ByteProducts& p, int64_t first, int64_t rows, const ProductsOut& out) {
    const int64_t groups = ceil_div(rows, kRows);
    for (int64_t i = 0; i < groups; ++i) memset(totals_[i], 0, p.tokens * sizeof totals_[0][0]);
    const int64_t chunks = ceil_div(p.w.inputs, kSuperBlock);
    for (int64_t begin = 0; begin < chunks; begin += kPanelChunks) {
      const int64_t count = mistral::min(kPanelChunks, chunks - begin);
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t row = first + i * kRows, rows_left = rows - i * kRows;
        for (int64_t j = 0; j < count; ++j) chunks_[j].take(p.w.from(row), rows_left, begin + j);
        // The weights that are unpacked next are those of the following rows, else the next block
        // of the first rows, else the next panel.
        Ahead ahead = i + 1 < groups ? Ahead(p.w.from(row + kRows), rows_left - kRows, begin)
                      : begin + count < chunks ? Ahead(p.w.from(first), rows, begin + count)
                                               : Ahead(p.w.from(row + kRows), kRows, 0);
        add_all_tokens(p, begin, count, ahead, totals_[i]);
      }
    }
    for (int64_t i = 0; i < groups; ++i) {
      for (int64_t token = 0; token < p.tokens; ++token) {
        float* sums = out.of_token(token) + first;
        for (int64_t row = i * kRows; row < mistral::min((i + 1) * kRows, rows); row += 16) {
          store_first(sums + row, Rows::sums_of(totals_[i][token], row % kRows / 16),
                      mistral::min(int64_t{16}, rows - row));
        }
      }
    }
  }

  // Prefetches the weights that are unpacked next, a few rows at a time.
  class Ahead {
   public:
    Ahead(const WeightRows& w, int64_t rows, int64_t chunk)
        : values_(w.values + chunk * kChunkBytes),
          scales_(w.scales + (chunk * kSuperBlock >> w.group_log2) * info(format).group_scales *
                                 info(format).scale_bytes),
          row_bytes_(w.row_bytes),
          scale_bytes_(w.scale_bytes),
          rows_(mistral::min(rows, kRows)) {}

    // Prefetches the next `count` rows, or fewer if fewer are left.
    void fetch_rows(int64_t count) {
      for (; count > 0 && rows_ > 0; --count, --rows_) {
        fetch<2>(values_, kPanelChunks * kChunkBytes);
        fetch<2>(scales_, 1);
        values_ += row_bytes_;
        scales_ += scale_bytes_;
      }
    }

   private:
    const char *values_, *scales_;
    int64_t row_bytes_, scale_bytes_, rows_;
  };

  // Adds the products of all tokens. Each step prefetches a share of `ahead`, because many cache
  // lines at a time would wait for each other. The function is not inlined: inside its caller, it
  // would make GCC 12 write slower code for the unpacking.
  [[gnu::noinline]] void add_all_tokens(const ByteProducts& p, int64_t begin, int64_t count,
                                        Ahead& ahead, typename Rows::Totals* totals) const {
    constexpr int N = Rows::kTokens;
    const int64_t share = ceil_div(kRows * N, p.tokens);
    const char* x = p.x + begin * int64_t{sizeof(ByteActivations)};
    int64_t token = 0;
    for (; token + N <= p.tokens; token += N) {
      ahead.fetch_rows(share);
      add_tokens<N>(x + token * p.stride_x, p.stride_x, count, totals + token);
    }
    for (; token < p.tokens; ++token) {
      ahead.fetch_rows(share);
      add_tokens<1>(x + token * p.stride_x, p.stride_x, count, totals + token);
    }
  }

  template <int N>
  void add_tokens(const char* x, int64_t stride_x, int64_t count,
                  typename Rows::Totals* totals) const {
    for (int64_t i = 0; i < count; ++i) {
      chunks_[i].template add<N>(x + i * int64_t{sizeof(ByteActivations)}, stride_x, totals);
    }
  }

  typename Rows::Totals totals_[kPanelRows / kRows][kPanelTokens];
  Rows chunks_[kPanelChunks];
};

}  // namespace mistral::cpu::MISTRAL_ISA

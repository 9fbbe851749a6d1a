// gemv with activations of 8 bits: each block of 32 activations of a token is rounded to integers
// of a 127th of its largest magnitude, and multiplied by weights of 4 to 6 bits as integers. That
// adds far less error than such weights have, and takes a fifth of the instructions of floats. 256
// values of a row are unpacked once for all tokens.
#pragma once

#include "byte_chunk.h"
#include "gemv.h"

namespace mistral::cpu::MISTRAL_ISA {

// Stands for the products of bytes of a format, in place of a chunk type.
template <WeightFormat format>
struct InBytes {
  struct Arithmetic {
    using Element = char;
  };
};

#if defined(MISTRAL_VECTORS)

// Unpacks 256 values of the first row, from chunk `i` on; values past K are zeros.
template <WeightFormat format>
MISTRAL_SIMD void take_chunk(const WeightRows& w, int64_t i, ByteChunk<format>& chunk) {
  constexpr int64_t kBytes = ByteChunk<format>::kBytes;
  const char* values = w.values + i * kBytes;
  const int64_t there = mistral::min(kSuperBlock, w.inputs - i * kSuperBlock);
  char rest[kBytes];
  if (there < kSuperBlock) {
    memset(rest, 0, sizeof rest);
    memcpy(rest, values, there / 2);
    values = rest;
  }
  chunk.take(values, w.scales, w.group_log2, i * kSuperBlock, there);
}

// Adds the products of a chunk with N tokens, whose packed activations are `stride_x` bytes apart.
template <int N, WeightFormat format>
MISTRAL_SIMD void add_chunk(const ByteChunk<format>& chunk, const char* x, int64_t stride_x,
                            ByteSums* totals) {
  const ByteActivations* tokens[N];
  ByteSums sums[N];
  for (int n = 0; n < N; ++n) {
    tokens[n] = reinterpret_cast<const ByteActivations*>(x + n * stride_x);
    sums[n] = totals[n];
  }
  chunk.add(tokens, sums);
  for (int n = 0; n < N; ++n) totals[n] = sums[n];
}

template <WeightFormat format>
struct Few<InBytes<format>> {
  using Chunk = ByteChunk<format>;

  static void multiply(const WeightRows& w, int64_t count, const char* x, int64_t stride_x,
                       int64_t tokens, float* out, int64_t stride_out) {
    for (int64_t row = 0; row < count; row += kGroupRows) {
      const int64_t rows = mistral::min(int64_t{kGroupRows}, count - row);
      if (tokens == 1) {
        multiply_group<1>(w.from(row), rows, x, stride_x, 1, out + row, stride_out);
      } else {
        multiply_group<0>(w.from(row), rows, x, stride_x, tokens, out + row, stride_out);
      }
    }
  }

 private:
  // N: the number of tokens; 0: `tokens`. Rows are multiplied in blocks of k, whose activations
  // stay in the L1 cache.
  template <int N>
  static void multiply_group(const WeightRows& w, int64_t rows, const char* x, int64_t stride_x,
                             int64_t tokens, float* out, int64_t stride_out) {
    constexpr int64_t kActivationBytes = 1 << 14;
    const int64_t block =
        mistral::max(int64_t{1}, kActivationBytes / (tokens * int64_t{sizeof(ByteActivations)}));
    const int64_t chunks = ceil_div(w.inputs, kSuperBlock);
    ByteSums totals[kGroupRows][N == 1 ? 1 : kGemvTokens] = {};
    fetch<3>(w.scales + 2 * rows * w.scale_bytes, rows * w.scale_bytes);
    for (int64_t begin = 0; begin < chunks; begin += N == 1 ? chunks : block) {
      const int64_t end = N == 1 ? chunks : mistral::min(begin + block, chunks);
      for (int64_t row = 0; row < rows; ++row) {
        multiply_row<N>(w.from(row), begin, end, x, stride_x, tokens, totals[row]);
      }
    }
    for (int64_t token = 0; token < (N == 1 ? 1 : tokens); ++token) {
      ByteSums of_rows[kGroupRows];
      for (int row = 0; row < kGroupRows; ++row) of_rows[row] = totals[row][token];
      float sums[kGroupRows];
      store_lanes(sums, sums_of_lanes(of_rows));
      memcpy(out + token * stride_out, sums, rows * sizeof(float));
    }
  }

  template <int N>
  MISTRAL_SIMD static void multiply_row(const WeightRows& w, int64_t begin, int64_t end,
                                        const char* x, int64_t stride_x, int64_t tokens,
                                        ByteSums* totals) {
    ByteSums total = totals[0];
    for (int64_t i = begin; i < end; ++i) {
      fetch_weights(w.values + i * Chunk::kBytes + kAheadBytes, Chunk::kBytes);
      Chunk chunk;
      take_chunk(w, i, chunk);
      const char* from = x + i * int64_t{sizeof(ByteActivations)};
      if constexpr (N == 1) {
        add_chunk<1>(chunk, from, 0, &total);
      } else {
        for (int64_t token = 0; token < tokens; ++token) {
          add_chunk<1>(chunk, from + token * stride_x, 0, totals + token);
        }
      }
    }
    if (N == 1) totals[0] = total;
  }
};

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

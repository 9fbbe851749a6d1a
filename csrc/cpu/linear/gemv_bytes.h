// gemv with activations of 8 bits: each block of 32 activations of a token is rounded to integers
// of a 127th of its largest magnitude, and multiplied by weights of 4 to 6 bits as integers. That
// adds far less error than such weights have, and takes a fifth of the instructions of floats. 256
// values of a row are unpacked once for all tokens.
#pragma once

#include "../simd/integers.h"
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

#if defined(__AVX2__)

// Rounds 32 activations to integers of a 127th of their largest magnitude, and returns this unit: 0
// if all are too small for its inverse, NaN if one is not finite. The integers are then 0.
inline float round_block(const float* x, int8_t* out) {
  const int32_t bits = largest_magnitude(x, 32);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  memset(out, 0, 32);
  if (largest <= 0x1p-120f) return 0.0f;
  if (!(largest <= 0x1.fffffep127f)) return NAN;
  const __m256 inverse = _mm256_set1_ps(127.0f / largest);
  for (int i = 0; i < 32; i += 8) {
    alignas(32) int32_t rounded[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(rounded),
                       _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
    for (int j = 0; j < 8; ++j) out[i + j] = static_cast<int8_t>(rounded[j]);
  }
  return largest / 127.0f;
}

// Packs `count` activations, at most kSuperBlock, and zeros after them.
template <class T>
ByteActivations pack_super_block(const T* x, int64_t count) {
  float values[kSuperBlock] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[i]);
  int8_t rounded[kSuperBlock];
  ByteActivations packed;
  for (int lane = 0; lane < 8; ++lane) {
    int8_t* block = rounded + 32 * block_at(lane);
    packed.scale[lane] = round_block(values + 32 * block_at(lane), block);
    int sums[2] = {};
    for (int i = 0; i < 32; ++i) sums[i / 16] += block[i];
    packed.sum[lane] = packed.scale[lane] * static_cast<float>(sums[0] + sums[1]);
    packed.halves[2 * lane] = static_cast<int16_t>(sums[0]);
    packed.halves[2 * lane + 1] = static_cast<int16_t>(sums[1]);
  }
  for (int vector = 0; vector < 8; ++vector) {
    for (int i = 0; i < 32; ++i) packed.values[vector][i] = rounded[byte_k_at(vector, i)];
  }
  return packed;
}

// Packs the K activations of a token as ByteActivations.
template <class T>
void pack_bytes(const T* x, int64_t inputs, char* out) {
  auto* packed = reinterpret_cast<ByteActivations*>(out);
  for (int64_t begin = 0; begin < inputs; begin += kSuperBlock) {
    *packed++ = pack_super_block(x + begin, mistral::min(kSuperBlock, inputs - begin));
  }
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
    __m256 totals[kGroupRows][N == 1 ? 1 : kGemvTokens];
    for (auto& row : totals) {
      for (auto& total : row) total = _mm256_setzero_ps();
    }
    fetch<3>(w.scales + 2 * rows * w.scale_bytes, rows * w.scale_bytes);
    for (int64_t begin = 0; begin < chunks; begin += N == 1 ? chunks : block) {
      const int64_t end = N == 1 ? chunks : mistral::min(begin + block, chunks);
      for (int64_t row = 0; row < rows; ++row) {
        multiply_row<N>(w.from(row), begin, end, x, stride_x, tokens, totals[row]);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t token = 0; token < (N == 1 ? 1 : tokens); ++token) {
        out[token * stride_out + row] = sum_of_lanes(totals[row][token]);
      }
    }
  }

  template <int N>
  MISTRAL_SIMD static void multiply_row(const WeightRows& w, int64_t begin, int64_t end,
                                        const char* x, int64_t stride_x, int64_t tokens,
                                        __m256* totals) {
    const auto at = [&](int64_t token, int64_t chunk) -> const ByteActivations& {
      return reinterpret_cast<const ByteActivations*>(x + token * stride_x)[chunk];
    };
    __m256 total = totals[0];
    for (int64_t i = begin; i < end; ++i) {
      const char* values = w.values + i * Chunk::kBytes;
      fetch<0>(values + kAheadBytes, Chunk::kBytes);
      const int64_t there = mistral::min(kSuperBlock, w.inputs - i * kSuperBlock);
      char rest[Chunk::kBytes];
      if (there < kSuperBlock) {
        memset(rest, 0, sizeof rest);
        memcpy(rest, values, there / 2);
        values = rest;
      }
      Chunk chunk;
      chunk.take(values, w.scales, w.group_log2, i * kSuperBlock, there);
      if constexpr (N == 1) {
        total = chunk.add(at(0, i), total);
      } else {
        for (int64_t token = 0; token < tokens; ++token) {
          totals[token] = chunk.add(at(token, i), totals[token]);
        }
      }
    }
    if (N == 1) totals[0] = total;
  }
};

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

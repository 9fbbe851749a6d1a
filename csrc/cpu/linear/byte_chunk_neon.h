// The chunk of byte_chunk.h for aarch64. Its instructions multiply signed bytes by signed bytes. So
// values keep their signs, and sums need no correction for an offset. The exceptions are int4 and
// q4_0: their values are unpacked 8 too large, which a minimum of -8 times the scale corrects.
#pragma once

#include "unpack_words.h"

namespace mistral::cpu::MISTRAL_ISA {

// The scales of a row in a chunk of 256 values: for each of its 8 blocks of 32 values, a factor and
// a minimum. The minimum is multiplied by the sum of the activations of the block.
template <WeightFormat format>
struct ByteNumbers {
  using Format = ByteFormat<format>;

  float factors[8], minima[8];
  int32_t of_halves[16];  // if kScalesOfHalves: scales of first halves, then of last halves

  MISTRAL_SIMD void take(const char* row_scales, int group_log2, int64_t k, int64_t there) {
    for (int lane = 0; lane < 8; ++lane) {
      // A block past the end of the row gets the scale of the last value. Any scale would do,
      // because activations are 0 there.
      const int64_t at = k + mistral::min(32 * lane, there - 1);
      if constexpr (Format::kBf16Scales) {
        factors[lane] = to_float(reinterpret_cast<const bf16*>(row_scales)[at >> group_log2]);
        minima[lane] = -8 * factors[lane];
      } else if constexpr (Format::kScalesOfHalves) {
        const char* group =
            row_scales + (at >> group_log2) * info(format).group_scales * info(format).scale_bytes;
        factors[lane] = half_at(group + 16);
        of_halves[lane] = static_cast<int8_t>(group[2 * lane]);
        of_halves[8 + lane] = static_cast<int8_t>(group[2 * lane + 1]);
      } else {
        const Scaling scaling = scaling_at<format>(row_scales, group_log2, at);
        factors[lane] = scaling.factor;
        minima[lane] = scaling.offset;
      }
    }
  }
};

// The chunk for one row.
template <WeightFormat format>
struct ByteRow : ByteFormat<format> {
  using Format = ByteFormat<format>;
  using Format::kBits, Format::kBytes, Format::kSigned, Format::kTable, Format::kScalesOfHalves;
  static constexpr int kRows = 1;
  using OneRow = ByteRow;
  using Numbers = ByteNumbers<format>;
  static constexpr bool kMinimum = !kTable && !kScalesOfHalves;

  Bytes32 values[8];
  Lanes8 factor;        // the scale of each block
  Lanes8 minimum;       // if kMinimum: the offset of each block; multiplies its sum of activations
  int32x4_t scales[4];  // if kScalesOfHalves: the scales of first halves, then of last halves

  // Unpacks the words of a row from value `k` on. `there` is the number of values from there to the
  // end of the row, at most 256. `row_scales` points to the scales of the whole row.
  MISTRAL_SIMD void take(const char* const (&words)[1], const char* const (&row_scales)[1],
                         int group_log2, int64_t k, int64_t there) {
    for (int half = 0; half < 2; ++half) take_half(words[0], half);
    take_scales(row_scales[0], group_log2, k, there);
  }

  // Adds the products of each block with the activations of N tokens to `totals`.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Lanes8 (&totals)[N]) const {
    const ByteActivations* x[N];
    for (int n = 0; n < N; ++n) x[n] = reinterpret_cast<const ByteActivations*>(lines[n]);
    for (int half = 0; half < 2; ++half) {
      int32x4_t sums[N], last[N];
      for (int n = 0; n < N; ++n) sums[n] = last[n] = vdupq_n_s32(0);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        for (int n = 0; n < N; ++n) {
          int32x4_t& sum = kScalesOfHalves && i >= 4 ? last[n] : sums[n];
          sum = add_byte_products(sum, values[i].v[half], vld1q_s8(x[n]->values[i] + 16 * half));
        }
      }
      for (int n = 0; n < N; ++n) {
        if (kScalesOfHalves) {
          sums[n] = vmlaq_s32(vmulq_s32(sums[n], scales[half]), last[n], scales[2 + half]);
        }
        float32x4_t& total = totals[n].v[half];
        const float32x4_t scale = vmulq_f32(factor.v[half], vld1q_f32(x[n]->scale + 4 * half));
        total = vfmaq_f32(total, vcvtq_f32_s32(sums[n]), scale);
        if (kMinimum) {
          total = vfmaq_f32(total, minimum.v[half], vld1q_f32(x[n]->sum + 4 * half));
        }
      }
    }
  }

  // Turns 16 unpacked values into the signed numbers that are multiplied.
  MISTRAL_SIMD static int8x16_t number(uint8x16_t values) {
    const int8x16_t numbers = vreinterpretq_s8_u8(values);
    if (kScalesOfHalves) return vsubq_s8(numbers, vdupq_n_s8(32));
    return kTable ? vqtbl1q_s8(vld1q_s8(kTable4), values) : numbers;
  }

 private:
  // Unpacks blocks 0 to 3 (half = 0) or 4 to 7. Block b of these four gets bytes 4 b to 4 b + 3 of
  // each values[i].v[half].
  MISTRAL_SIMD void take_half(const char* words, int half) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(words);
    // val[i] holds word i of each block.
    const uint32x4x4_t lanes = vld4q_u32(reinterpret_cast<const uint32_t*>(words) + 16 * half);
    uint8x16_t further[2] = {};
    for (int i = 0; i < kBits - 4; ++i) further[i] = vld1q_u8(bytes + 128 + 32 * i + 16 * half);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      uint8x16_t word = vreinterpretq_u8_u32(lanes.val[i / 2]);
      // Turns two's complement into unsigned values that are 8 larger.
      if (kSigned) word = veorq_u8(word, vdupq_n_u8(0x88));
      uint8x16_t value = i % 2 == 0 ? vandq_u8(word, vdupq_n_u8(15)) : vshrq_n_u8(word, 4);
      if (kBits == 5) value = vorrq_u8(value, moved(further[0], i, 0x10));
      if (kBits == 6) value = vorrq_u8(value, moved(further[i / 4], 2 * (i % 4), 0x30));
      values[i].v[half] = number(value);
    }
  }

  // Moves the bits of each byte, from bit `from` on, to bit 4, and keeps those of `mask`.
  MISTRAL_SIMD static uint8x16_t moved(uint8x16_t bytes, int from, uint8_t mask) {
    return vandq_u8(from < 4 ? bytes << (4 - from) : bytes >> (from - 4), vdupq_n_u8(mask));
  }

  MISTRAL_SIMD void take_scales(const char* row_scales, int group_log2, int64_t k, int64_t there) {
    Numbers numbers;
    numbers.take(row_scales, group_log2, k, there);
    for (int half = 0; half < 2; ++half) {
      factor.v[half] = vld1q_f32(numbers.factors + 4 * half);
      if (kMinimum) minimum.v[half] = vld1q_f32(numbers.minima + 4 * half);
    }
    for (int i = 0; kScalesOfHalves && i < 4; ++i) scales[i] = vld1q_s32(numbers.of_halves + 4 * i);
  }
};

#if !defined(__ARM_FEATURE_MATMUL_INT8)
template <WeightFormat format>
struct ByteChunk : ByteRow<format> {};
#endif

}  // namespace mistral::cpu::MISTRAL_ISA

#if defined(__ARM_FEATURE_MATMUL_INT8)
#include "byte_chunk_i8mm.h"
#endif

// A chunk holds 256 weights of each of kRows rows, unpacked to bytes. It multiplies them by
// activations in bytes. This file has the chunk for AVX2, which has one row. Each of the 8 blocks
// of 32 values has a 32-bit lane in every vector (lane_of in bytes.h). So no sum mixes blocks, one
// vector holds the scales of all blocks, and one conversion to floats serves 256 values. AVX-512
// with VNNI has a chunk of its own (byte_chunk_512.h), and so has aarch64 (byte_chunk_neon.h).
#pragma once

#include <type_traits>

#include "byte_activations.h"
#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// Whether this instruction set multiplies weights of a format in bytes.
constexpr bool has_bytes(WeightFormat format) {
#if defined(__AVX512F__)
  // int4 has other kernels here, which are already as fast as memory.
  if (format == WeightFormat::int4) return false;
#elif !defined(MISTRAL_VECTORS)
  return false;
#endif
  return info(format).element_bits == 32;
}

// Whether AMX multiplies weights by more than kGemvTokens tokens of type T.
template <class T>
#if defined(__AMX_BF16__)
constexpr bool kInTiles = std::is_same_v<T, bf16>;
#else
constexpr bool kInTiles = false;
#endif

// Whether this instruction set multiplies a format in bytes also with more than kGemvTokens tokens
// of type T. AMX is faster than products in bytes. On x86, formats with a table of values (kTable4)
// need VNNI. Without it each of their products has to be widened, which takes longer than products
// of floats.
template <class T>
constexpr bool has_many_bytes(WeightFormat format) {
#if defined(__AVX2__) && !defined(MISTRAL_BYTE_PRODUCTS)
  if (format == WeightFormat::iq4_nl || format == WeightFormat::iq4_xs) return false;
#endif
  return has_bytes(format) && !kInTiles<T>;
}

// The properties of a format on which the code of the chunks depends.
template <WeightFormat format>
struct ByteFormat {
  static constexpr int kBits = static_cast<int>(info(format).bits);
  static constexpr int64_t kValues = kSuperBlock;
  static constexpr int64_t kBytes = kValues / 8 * kBits;
  // Values are in two's complement. They become unsigned values that are 8 larger.
  static constexpr bool kSigned = format == WeightFormat::int4 || format == WeightFormat::q4_0;
  static constexpr bool kTable = format == WeightFormat::iq4_nl || format == WeightFormat::iq4_xs;
  // Scales are bf16, not fp16.
  static constexpr bool kBf16Scales = format == WeightFormat::int4;
  // Each half of a block has its own scale.
  static constexpr bool kScalesOfHalves = format == WeightFormat::q6_k;
  // With kPairs, a group has two numbers: its scale and its minimum. With kZeroPoints, the second
  // number is a zero point instead.
  static constexpr bool kZeroPoints = format == WeightFormat::q4_z;
  static constexpr bool kPairs = kZeroPoints || format == WeightFormat::q4_1;
  // If one of these two is true, scales have 6 bits. With kSixBitScales, a super-block has scales
  // and minima (six_bit_scales). With kSplitScales, it has scales alone (split_scales).
  static constexpr bool kSixBitScales =
      format == WeightFormat::q4_k || format == WeightFormat::q5_k;
  static constexpr bool kSplitScales = format == WeightFormat::iq4_xs;
  // A weight is its scale times its value, plus an offset from a minimum or a zero point.
  static constexpr bool kMinima = kPairs || kSixBitScales;

  static constexpr int kTokens = 1;  // the number of tokens that are packed together
  // gemv_chunks.h explains these members of chunk types. Here each block of activations has its own
  // unit. So a packed token needs no head to hold a common unit.
  static constexpr int64_t kHeadBytes = 0;
  static constexpr int64_t kLineBytes = sizeof(ByteActivations);
  static constexpr float unit(const char*) { return 1.0f; }

#if defined(MISTRAL_VECTORS)
  using Sums = ByteSums;
  static void store_sums(const Sums (&sums)[8], float, float* out) { store_row_sums(sums, out); }
#endif
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

template <WeightFormat format>
struct ByteChunk : ByteFormat<format> {
  using Format = ByteFormat<format>;
  using Format::kBits, Format::kBytes, Format::kSigned, Format::kTable, Format::kPairs;
  static constexpr int kRows = 1;
  using OneRow = ByteChunk;
  static constexpr bool kMinimum = kSigned || Format::kMinima;
  // The instructions multiply unsigned values by signed activations, but the values of kTable
  // formats are signed. Without kSumsOf32Bits, their magnitudes are multiplied, and their signs
  // move to the activations. With kSumsOf32Bits, they become unsigned values that are 128 larger.
  static constexpr bool kMagnitudes = kTable && !kSumsOf32Bits;
  // The largest value or magnitude that is multiplied without kSumsOf32Bits.
  static constexpr int kLargest = kTable ? 127 : (1 << kBits) - 1;
  // The number of vectors of values whose products are summed before the sums are widened. It is as
  // large as it can be without an overflow. In q6_k it is at most 4, because the first 4 vectors
  // and the last 4 have different scales: those of the first and of the last halves of blocks.
  static constexpr int kFit =
      kSumsOf32Bits ? (kBits == 6 ? 4 : 8) : (kTable ? 1 : 8 >> (kBits - 4));
  // A lane of 16 bits gets two products from each vector. Activations are -127 to 127.
  static_assert(kSumsOf32Bits || kLargest * 127 * 2 * kFit <= 32767, "");

  Bytes32 values[8];
  __m256 factor;   // the scale of each block
  __m256 minimum;  // the offset of each block, if kMinimum; multiplies the sum of activations
  __m256i scales;  // q6_k: the scales of the halves of each block, in 16 bits

  // Unpacks the words of a row from value `k` on. `there` is the number of values from there to the
  // end of the row, at most 256. `row_scales` points to the scales of the whole row.
  MISTRAL_SIMD void take(const char* const (&row_words)[1], const char* const (&row_scales)[1],
                         int group_log2, int64_t k, int64_t there) {
    const char* words = row_words[0];
    __m256i in[4], lanes[4];
    for (int i = 0; i < 4; ++i) {
      in[i] = load_32(words + 32 * i);
      // Turns two's complement into unsigned values that are 8 larger.
      if (kSigned) in[i] = _mm256_xor_si256(in[i], _mm256_set1_epi8(static_cast<char>(0x88)));
    }
    words_to_lanes(in, lanes);
    __m256i further[2];
    for (int i = 0; i < kBits - 4; ++i) further[i] = load_blocks_to_lanes(words + 128 + 32 * i);
    __m256i fifth[8];
    if (kBits == 5) fifth_bits(further[0], fifth);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m256i word = lanes[i / 2];
      values[i] = mask_bytes(i % 2 == 0 ? word : _mm256_srli_epi16(word, 4), 15);
      if (kBits == 5) values[i] = _mm256_or_si256(values[i], mask_bytes(fifth[i], 0x10));
      if (kBits == 6) {
        const __m256i pairs = further[i / 4];
        const __m256i bits =
            i % 4 == 3 ? _mm256_srli_epi32(pairs, 2) : _mm256_slli_epi32(pairs, 4 - 2 * (i % 4));
        values[i] = _mm256_or_si256(values[i], mask_bytes(bits, 0x30));
      }
      if (kTable) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTable4));
        values[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), values[i]);
        if (!kMagnitudes) values[i] = _mm256_xor_si256(values[i], _mm256_set1_epi8(-128));
      }
    }
    constexpr int64_t kGroupBytes = info(format).group_scales * info(format).scale_bytes;
    take_scales(row_scales[0] + (k >> group_log2) * kGroupBytes, group_log2, there);
  }

  // Adds the products of each block with the activations of N tokens to `totals`.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], __m256 (&totals)[N]) const {
    const ByteActivations* x[N];
    for (int n = 0; n < N; ++n) x[n] = reinterpret_cast<const ByteActivations*>(lines[n]);
    __m256i sums[N];
    multiply(x, sums);
    for (int n = 0; n < N; ++n) {
      const __m256 scale = _mm256_mul_ps(factor, _mm256_loadu_ps(x[n]->scale));
      totals[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[n]), scale, totals[n]);
      if (kMinimum) totals[n] = _mm256_fmadd_ps(minimum, _mm256_loadu_ps(x[n]->sum), totals[n]);
    }
  }

 private:
  // out[i] = bit i of each byte, moved to bit 4. The caller masks the other bits. The code doubles
  // where it could shift, because some processors have only one unit for shifts.
  MISTRAL_SIMD static void fifth_bits(__m256i x, __m256i (&out)[8]) {
    out[4] = x;
    for (int i = 3; i >= 0; --i) out[i] = _mm256_add_epi8(out[i + 1], out[i + 1]);
    __m256i high = _mm256_srli_epi16(x, 4);
    for (int i = 7; i >= 5; --i) out[i] = high = _mm256_add_epi8(high, high);
  }

  // sums[n] = the sum of the products of each block with token n. Each vector of values is
  // multiplied by all tokens before the next vector, so that the additions of a token need not wait
  // for each other.
  template <int N>
  MISTRAL_SIMD void multiply(const ByteActivations* const (&x)[N], __m256i (&sums)[N]) const {
    for (int n = 0; n < N; ++n) sums[n] = minus_offsets(*x[n]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += kFit) {
      __m256i some[N];
      for (int n = 0; n < N; ++n) some[n] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int j = i; j < i + kFit; ++j) {
        const Bytes32 without_sign = kMagnitudes ? _mm256_abs_epi8(values[j]) : values[j];
        for (int n = 0; n < N; ++n) {
          Bytes32 with_sign = load_32(x[n]->values[j]);
          if (kMagnitudes) with_sign = _mm256_sign_epi8(with_sign, values[j]);
          some[n] = add_byte_products(some[n], without_sign, with_sign);
          if (N > 1) keep_order(some[n]);
        }
      }
      for (int n = 0; n < N; ++n) {
        sums[n] = _mm256_add_epi32(sums[n], scaled(some[n], i));
        if (N > 1) keep_order(sums[n]);
      }
    }
  }

  // The start of the sums: minus (the offset of the unpacked values times the sum of the
  // activations). It is 0 if there is no offset, or if `minimum` corrects it.
  MISTRAL_SIMD __m256i minus_offsets(const ByteActivations& x) const {
    const __m256i zero = _mm256_setzero_si256();
    if (Format::kScalesOfHalves) {  // the offset is 32, and each half has its scale
      return _mm256_sub_epi32(zero,
                              _mm256_slli_epi32(_mm256_madd_epi16(scales, load_32(x.halves)), 5));
    }
    if (kTable && !kMagnitudes) {
      const __m256i sum = _mm256_madd_epi16(_mm256_set1_epi16(1), load_32(x.halves));
      return _mm256_sub_epi32(zero, _mm256_slli_epi32(sum, 7));
    }
    return zero;
  }

  // Widens sums to 32 bits. They are the sums of the kFit vectors from vector i on. In q6_k these
  // vectors share scales, and this function also multiplies the sums by the scales.
  MISTRAL_SIMD __m256i scaled(__m256i sums, int i) const {
    if (!Format::kScalesOfHalves) return widen_sums(sums);
    if (kSumsOf32Bits) {
      const __m256i first = i < 4 ? _mm256_slli_epi32(scales, 16) : scales;
      return _mm256_mullo_epi32(sums, _mm256_srai_epi32(first, 16));
    }
    const __m256i both = i < 4 ? _mm256_blend_epi16(scales, _mm256_slli_epi32(scales, 16), 0xaa)
                               : _mm256_blend_epi16(_mm256_srli_epi32(scales, 16), scales, 0xaa);
    return _mm256_madd_epi16(sums, both);
  }

  // Takes the scales of the chunk. `group` points to those of its first group.
  MISTRAL_SIMD void take_scales(const char* group, int group_log2, int64_t there) {
    if constexpr (Format::kSixBitScales) {
      uint32_t unpacked[4];
      six_bit_scales(group, unpacked);
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      const __m128i all = _mm_shuffle_epi8(
          _mm_setr_epi32(static_cast<int>(unpacked[0]), static_cast<int>(unpacked[1]),
                         static_cast<int>(unpacked[2]), static_cast<int>(unpacked[3])),
          order);
      const __m256 scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all));
      const __m256 least = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)));
      factor = _mm256_mul_ps(scale, half(group));
      minimum = _mm256_mul_ps(least, _mm256_sub_ps(_mm256_setzero_ps(), half(group + 2)));
    } else if constexpr (Format::kScalesOfHalves) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
      const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
      factor = half(group + 16);
    } else if constexpr (Format::kSplitScales) {
      const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(split_scales(group)));
      const __m128i centred = _mm_sub_epi8(bytes, _mm_set1_epi8(32));
      factor = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(centred)), half(group));
    } else {
      take_group_scales(group, group_log2, there);
    }
  }

  // Takes the scales of groups of 32, 64 or 128 values. A group has one or two 16-bit numbers.
  MISTRAL_SIMD void take_group_scales(const char* group, int group_log2, int64_t there) {
    constexpr int64_t kSize = kPairs ? 4 : 2;
    const __m256i scales_there = load_first_bytes(group, (there >> group_log2) * kSize);
    // For each lane, the index of the group to which its block belongs.
    const __m256i index = _mm256_srl_epi32(_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7),
                                           _mm_cvtsi32_si128(group_log2 - 5));
    if constexpr (kPairs) {
      const __m256i pairs = _mm256_permutevar8x32_epi32(scales_there, index);
      const __m256i apart =
          _mm256_shuffle_epi8(pairs, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
      const __m256i halves = _mm256_permute4x64_epi64(apart, 0b11011000);
      factor = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
      minimum = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
      if (Format::kZeroPoints) {
        minimum = _mm256_mul_ps(minimum, _mm256_sub_ps(_mm256_setzero_ps(), factor));
      }
    } else {
      const __m128i halves = _mm256_castsi256_si128(scales_there);
      const __m256 scale =
          Format::kBf16Scales
              ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))
              : _mm256_cvtph_ps(halves);
      factor = _mm256_permutevar8x32_ps(scale, index);
      if (kSigned) minimum = _mm256_mul_ps(factor, _mm256_set1_ps(-8.0f));
    }
  }

  MISTRAL_SIMD static __m256 half(const char* p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(bits)));
  }
};

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

#if defined(__AVX512VNNI__)
#include "byte_chunk_512.h"
#elif defined(MISTRAL_NEON)
#include "byte_chunk_neon.h"
#endif

// The scales of 256 values that are stored in words, for AVX-512: a vector has a lane for each of
// 16 words. unpack_words.h and byte_chunk_512.h read them.
#pragma once

#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// Lane i of the result is lane `index[i]` of x.
MISTRAL_SIMD __m512 lanes_at(__m512i index, __m512 x) { return _mm512_permutexvar_ps(index, x); }
// Lane i is lane_of(i).
template <class LaneOf>
MISTRAL_SIMD __m512i lanes_of(const LaneOf& lane_of) {
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = lane_of(i);
  return _mm512_load_si512(lanes);
}

MISTRAL_SIMD __m512 half_in_all_lanes(const char* p) {
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(bits)));
}
MISTRAL_SIMD __m512 widen_signed(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

template <WeightFormat format>
struct WordScales {
  static constexpr bool kPairs = format == WeightFormat::q4_1 || format == WeightFormat::q4_z;
  static constexpr bool kMinima =
      kPairs || format == WeightFormat::q4_k || format == WeightFormat::q5_k;

  __m512 factors[2];  // of words 0 to 15 and of words 16 to 31
  __m512 halves;      // the factor of each 16 values
  __m512 minima;      // is added to each 16 values, if kMinima

  // `row_scales` are those of the row, `k` is the first value, a multiple of 256; `there`: how many
  // there are.
  MISTRAL_SIMD WordScales(const char* row_scales, int group_log2, int64_t k, int64_t there) {
    constexpr int64_t kGroupBytes = info(format).group_scales * info(format).scale_bytes;
    const char* group = row_scales + (k >> group_log2) * kGroupBytes;
    if constexpr (format == WeightFormat::q4_k || format == WeightFormat::q5_k) {
      uint32_t packed[4];
      memcpy(packed, group, sizeof packed);
      constexpr uint32_t kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f, kTwo = 0x03030303;
      const uint32_t last_scales = (packed[3] & kFour) | (packed[1] >> 6 & kTwo) << 4;
      const uint32_t last_minima = (packed[3] >> 4 & kFour) | (packed[2] >> 6 & kTwo) << 4;
      // Scales in lanes 0 to 7, minima in the others.
      const __m512 all = widen_signed(
          _mm_setr_epi32(static_cast<int>(packed[1] & kSix), static_cast<int>(last_scales),
                         static_cast<int>(packed[2] & kSix), static_cast<int>(last_minima)));
      const __m512 units = _mm512_mask_sub_ps(half_in_all_lanes(group), 0xff00, _mm512_setzero_ps(),
                                              half_in_all_lanes(group + 2));
      const __m512 scaled = _mm512_mul_ps(all, units);
      spread(scaled, [](int block) { return block; });
      minima = lanes_at(lanes_of([](int half) { return 8 + half / 2; }), scaled);
    } else if constexpr (format == WeightFormat::q6_k) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
      halves = _mm512_mul_ps(widen_signed(bytes), half_in_all_lanes(group + 16));
      for (int i = 0; i < 2; ++i) {
        factors[i] = lanes_at(lanes_of([&](int lane) { return 8 * i + lane / 2; }), halves);
      }
    } else if constexpr (format == WeightFormat::iq4_xs) {
      uint32_t low, high = 0;
      memcpy(&high, group + 2, sizeof(uint16_t));
      memcpy(&low, group + 4, sizeof low);
      // A byte for each two blocks, with the high bits of both.
      high = (high | high << 8) & 0x00ff00ff;
      high = (high | high << 4) & 0x0f0f0f0f;
      constexpr uint32_t kFour = 0x0f0f0f0f, kTwo = 0x03030303;
      const uint32_t even = (low & kFour) | (high & kTwo) << 4;
      const uint32_t odd = (low >> 4 & kFour) | (high >> 2 & kTwo) << 4;
      const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(even | uint64_t{odd} << 32));
      const __m512 scales = widen_signed(_mm_sub_epi8(bytes, _mm_set1_epi8(32)));
      spread(_mm512_mul_ps(scales, half_in_all_lanes(group)),
             [](int block) { return block % 2 * 4 + block / 2; });
    } else {
      take_groups(group, group_log2, there);
    }
  }

 private:
  // Gives each lane the scale of its block, which is lane at(block) of `scales`.
  template <class At>
  MISTRAL_SIMD void spread(__m512 scales, const At& at) {
    for (int i = 0; i < 2; ++i) {
      factors[i] = lanes_at(lanes_of([&](int lane) { return at(4 * i + lane / 4); }), scales);
    }
    halves = lanes_at(lanes_of([&](int half) { return at(half / 2); }), scales);
  }

  // Scales of groups of 32, 64 or 128 values, one or two of 16 bits each.
  MISTRAL_SIMD void take_groups(const char* group, int group_log2, int64_t there) {
    constexpr int kNumbers = kPairs ? 2 : 1;
    const auto count = static_cast<unsigned>((there >> group_log2) * kNumbers);
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), group);
    const __m512 numbers = _mm512_cvtph_ps(raw);
    // The number that belongs to the block in each lane.
    const __m128i shift = _mm_cvtsi32_si128(group_log2 - 5);
    const auto first_of = [&](__m512i blocks) {
      return _mm512_slli_epi32(_mm512_srl_epi32(blocks, shift), kNumbers - 1);
    };
    for (int i = 0; i < 2; ++i) {
      factors[i] =
          lanes_at(first_of(lanes_of([&](int lane) { return 4 * i + lane / 4; })), numbers);
    }
    const __m512i of_halves = first_of(lanes_of([](int half) { return half / 2; }));
    halves = lanes_at(of_halves, numbers);
    if (kPairs) {
      minima = lanes_at(_mm512_add_epi32(of_halves, _mm512_set1_epi32(1)), numbers);
      if (format == WeightFormat::q4_z) {
        minima = _mm512_mul_ps(minima, _mm512_sub_ps(_mm512_setzero_ps(), halves));
      }
    }
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

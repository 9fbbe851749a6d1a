// The scales of 256 values of four rows, for byte_chunk_512.h. Each 128-bit lane of a vector
// belongs to a block of 32 values. It has four places of 32 bits, one for each row.
#pragma once

#include "unpack_words.h"

namespace mistral::cpu::MISTRAL_ISA {

template <WeightFormat format>
struct ByteScales {
  using Format = ByteFormat<format>;
  static constexpr int kRows = 4;

  // Element 0 of each array belongs to blocks 0 to 3, element 1 to blocks 4 to 7. In q6_k each half
  // of a block has a scale. There `factors` has the scales of the first halves for rows 0 and 1,
  // and those of the last halves for rows 2 and 3. `other_factors` has the scales of the other
  // halves. This is how the sums of halves come out of the mixed vectors of byte_chunk_512.h.
  __m512 factors[2], other_factors[2];
  __m512 minima[2];  // if Format::kMinima: to multiply by the sums of activations

  // `row_scales` points to the scales of the whole rows. `k` is the index of the first value, a
  // multiple of 256. `there` is the number of values from there to the end of a row, at most 256.
  MISTRAL_SIMD void take(const char* const (&row_scales)[kRows], int group_log2, int64_t k,
                         int64_t there) {
    constexpr int64_t kGroupBytes = info(format).group_scales * info(format).scale_bytes;
    const char* groups[kRows];
    for (int r = 0; r < kRows; ++r) groups[r] = row_scales[r] + (k >> group_log2) * kGroupBytes;
    if constexpr (Format::kSixBitScales) {
      take_six_bits(groups);
    } else if constexpr (Format::kScalesOfHalves) {
      take_bytes(groups);
    } else if constexpr (Format::kSplitScales) {
      take_split(groups);
    } else if constexpr (Format::kPairs) {
      take_pairs(groups, group_log2, there);
    } else {
      take_halves(groups, group_log2, there);
    }
  }

 private:
  MISTRAL_SIMD static __m128i load_16(const char* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  // Loads 16 bytes of each row. Each row gets a 128-bit lane.
  MISTRAL_SIMD static __m512i load_lanes(const char* const (&from)[kRows]) {
    __m512i all = _mm512_castsi128_si512(load_16(from[0]));
    all = _mm512_inserti32x4(all, load_16(from[1]), 1);
    all = _mm512_inserti32x4(all, load_16(from[2]), 2);
    return _mm512_inserti32x4(all, load_16(from[3]), 3);
  }
  // low_halves and high_halves convert the low or the high 16 bits of each 32-bit lane from fp16 to
  // fp32.
  MISTRAL_SIMD static __m512 low_halves(__m512i x) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
  }
  MISTRAL_SIMD static __m512 high_halves(__m512i x) { return low_halves(_mm512_srli_epi32(x, 16)); }
  MISTRAL_SIMD static __m512 minus(__m512 x) { return _mm512_sub_ps(_mm512_setzero_ps(), x); }

  // Takes the scales of groups of 32, 64 or 128 values. Each group has one scale, in fp16.
  MISTRAL_SIMD void take_halves(const char* const (&groups)[kRows], int group_log2, int64_t there) {
    const auto mask = static_cast<__mmask8>((1u << (there >> group_log2)) - 1);
    const auto both = [&](int r) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_maskz_loadu_epi16(mask, groups[r])),
                                     _mm_maskz_loadu_epi16(mask, groups[r + 1]), 1);
    };
    const __m256i first = both(0), last = both(2);
    for (int i = 0; i < 2; ++i) {
      // The numbers of neighbouring rows are 8 elements apart in `first` and `last` together.
      int16_t rows[16], blocks[16];
      for (int lane = 0; lane < 16; ++lane) {
        rows[lane] = static_cast<int16_t>(lane % 4 * 8);
        blocks[lane] = static_cast<int16_t>(4 * i + lane / 4);
      }
      const __m256i of_groups =
          _mm256_srl_epi16(load_32(blocks), _mm_cvtsi32_si128(group_log2 - 5));
      const __m256i at = _mm256_add_epi16(load_32(rows), of_groups);
      factors[i] = _mm512_cvtph_ps(_mm256_permutex2var_epi16(first, at, last));
    }
  }

  // Does the same as take_halves for formats in which a group has two 16-bit numbers.
  MISTRAL_SIMD void take_pairs(const char* const (&groups)[kRows], int group_log2, int64_t there) {
    const auto mask = static_cast<__mmask8>((1u << (there >> group_log2)) - 1);
    const auto both = [&](int r) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi32(mask, groups[r])),
                                _mm256_maskz_loadu_epi32(mask, groups[r + 1]), 1);
    };
    const __m512i first = both(0), last = both(2);
    for (int i = 0; i < 2; ++i) {
      const __m512i of_groups = _mm512_srl_epi32(
          lanes_of([&](int lane) { return 4 * i + lane / 4; }), _mm_cvtsi32_si128(group_log2 - 5));
      const __m512i at =
          _mm512_add_epi32(lanes_of([](int lane) { return lane % 4 * 8; }), of_groups);
      const __m512i pairs = _mm512_permutex2var_epi32(first, at, last);
      factors[i] = low_halves(pairs);
      minima[i] = high_halves(pairs);
      if (Format::kZeroPoints) minima[i] = _mm512_mul_ps(minima[i], minus(factors[i]));
    }
  }

  // Takes two units, and scales and minima of 6 bits, in the layout that six_bit_scales (formats.h)
  // describes.
  MISTRAL_SIMD void take_six_bits(const char* const (&groups)[kRows]) {
    const __m512i all = load_lanes(groups);
    const __m512i units =
        _mm512_permutexvar_epi32(lanes_of([](int lane) { return lane % 4 * 4; }), all);
    const __m512 scale = low_halves(units), least = minus(high_halves(units));
    const __m512i bytes = six_bit_bytes(all);
    const auto numbers = [&](int word) {
      const __m512i of_rows =
          _mm512_permutexvar_epi32(lanes_of([&](int lane) { return lane % 4 * 4 + word; }), bytes);
      // In 128-bit lane b, each place gets byte b of its word as an integer. The indices 0x80 give
      // zero bytes.
      const auto at = [](int lane) {
        return static_cast<int32_t>(0x80808000u) | (lane % 4 * 4 + lane / 4);
      };
      return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(of_rows, lanes_of(at)));
    };
    for (int i = 0; i < 2; ++i) {
      factors[i] = _mm512_mul_ps(numbers(i), scale);
      minima[i] = _mm512_mul_ps(numbers(2 + i), least);
    }
  }

  // Takes a signed byte for each 16 values, and the unit behind these bytes.
  MISTRAL_SIMD void take_bytes(const char* const (&groups)[kRows]) {
    const __m512i all = load_lanes(groups);
    // A unit has 16 bits, and two zero bytes follow it.
    int32_t units[kRows];
    for (int r = 0; r < kRows; ++r) memcpy(&units[r], groups[r] + 16, sizeof units[r]);
    const __m512 unit =
        low_halves(_mm512_broadcast_i32x4(_mm_setr_epi32(units[0], units[1], units[2], units[3])));
    for (int i = 0; i < 2; ++i) {
      const auto scales_of = [&](bool other) {
        const __m512i of_rows = _mm512_permutexvar_epi32(
            lanes_of([&](int lane) { return lane % 4 * 4 + 2 * i + lane / 8; }), all);
        // Moves a scale to the highest byte of its 32-bit lane. An arithmetic shift then widens it.
        const auto at = [&](int lane) {
          const int byte = lane % 4 * 4 + lane / 4 % 2 * 2 + (lane % 4 / 2 != other);
          return static_cast<int32_t>(0x808080u | static_cast<uint32_t>(byte) << 24);
        };
        const __m512i high = _mm512_shuffle_epi8(of_rows, lanes_of(at));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24)), unit);
      };
      factors[i] = scales_of(false);
      other_factors[i] = scales_of(true);
    }
  }

  // Takes the unit of the super-block of each row, and its scales of 6 bits. The low and the high
  // bits of a scale lie apart, as scaling_at of unpack_words.h shows.
  MISTRAL_SIMD void take_split(const char* const (&groups)[kRows]) {
    const auto both = [&](int r) {
      const auto* first = reinterpret_cast<const __m128i*>(groups[r]);
      const auto* second = reinterpret_cast<const __m128i*>(groups[r + 1]);
      return _mm_castsi128_ps(_mm_unpacklo_epi64(_mm_loadl_epi64(first), _mm_loadl_epi64(second)));
    };
    const __m128 rows[2] = {both(0), both(2)};
    const __m512i first =
        _mm512_broadcast_i32x4(_mm_castps_si128(_mm_shuffle_ps(rows[0], rows[1], 0b10001000)));
    const __m512i last =
        _mm512_broadcast_i32x4(_mm_castps_si128(_mm_shuffle_ps(rows[0], rows[1], 0b11011101)));
    const __m512 unit = low_halves(first);
    for (int i = 0; i < 2; ++i) {
      const auto shifted = [&](__m512i x, int begin, int bits) {
        const auto shift = [&](int lane) { return begin + bits * (4 * i + lane / 4); };
        return _mm512_srlv_epi32(x, lanes_of(shift));
      };
      const __m512i low = _mm512_and_si512(shifted(last, 0, 4), _mm512_set1_epi32(15));
      const __m512i scale = _mm512_ternarylogic_epi32(
          shifted(first, 12, 2), _mm512_set1_epi32(0x30), low, 0xea);  // (a & b) | c
      const __m512i centred = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
      factors[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), unit);
    }
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

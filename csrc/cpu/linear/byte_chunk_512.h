// The part of byte_chunk.h for AVX-512 with VNNI. Each instruction multiplies 16 words of weights
// as they come from memory, those of four blocks, so nothing has to be moved between lanes but
// scales.
#pragma once

#include "../simd/integers.h"
#include "word_scales.h"

namespace mistral::cpu::MISTRAL_ISA {

template <WeightFormat format>
struct ByteChunk : ByteFormat<format> {
  using Format = ByteFormat<format>;
  using Format::kBits, Format::kBytes, Format::kSigned, Format::kTable;
  using Scales = WordScales<format>;
  // Values are unpacked to unsigned bytes, which are too large by this.
  static constexpr int kOffset = kTable ? 128 : kSigned ? 8 : kBits == 6 ? 32 : 0;

  Bytes values[4];  // words 0 to 15, their low and their high halves of bytes, then words 16 to 31
  __m512 factors[2];  // of words 0 to 15 and of words 16 to 31
  __m512 minima;      // is added for each activation of 16 values

  // Unpacks `words`. `row_scales` are those of the row, `k` is the first value; `there`: how many
  // there are.
  MISTRAL_SIMD void take(const char* words, const char* row_scales, int group_log2, int64_t k,
                         int64_t there) {
    for (int i = 0; i < 2; ++i) {
      __m512i word = _mm512_loadu_si512(words + 64 * i);
      // Two's complement becomes unsigned values that are 8 larger.
      if (kSigned) word = _mm512_xor_si512(word, _mm512_set1_epi8(static_cast<char>(0x88)));
      const __m512i further = further_words(words + kSuperBlock / 2, i);
      for (int half = 0; half < 2; ++half) {
        const __m512i shifted = half == 0 ? word : _mm512_srli_epi16(word, 4);
        __m512i value = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
        if (kBits > 4) value = _mm512_or_si512(value, further_bits(further, half));
        if (kTable) value = _mm512_xor_si512(look_up(value), _mm512_set1_epi8(-128));
        values[2 * i + half] = {value};
      }
    }
    const Scales scales(row_scales, group_log2, k, there);
    factors[0] = scales.factors[0];
    factors[1] = scales.factors[1];
    if (Scales::kMinima) {
      minima = scales.minima;
    } else {
      minima = _mm512_mul_ps(scales.halves, _mm512_set1_ps(-kOffset));
    }
  }

  // Adds the products with the activations of N tokens.
  template <int N>
  MISTRAL_SIMD void add(const ByteActivations* const (&x)[N], ByteSums (&totals)[N]) const {
    Ints sums[N][2];
    for (int i = 0; i < 2; ++i) {
      for (int n = 0; n < N; ++n) sums[n][i] = broadcast_int(0);
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        for (int n = 0; n < N; ++n) {
          sums[n][i] = add_products(sums[n][i], values[j], load_bytes(x[n]->values[j]));
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      const auto scaled = [&](int i) {
        return _mm512_mul_ps(factors[i], _mm512_loadu_ps(x[n]->scale[i]));
      };
      __m512 sum = _mm512_mul_ps(minima, _mm512_loadu_ps(x[n]->sum));
      sum = _mm512_fmadd_ps(to_vec(sums[n][0]).v, scaled(0), sum);
      sum = _mm512_fmadd_ps(to_vec(sums[n][1]).v, scaled(1), sum);
      totals[n] = _mm512_add_ps(totals[n], sum);
    }
  }

 private:
  MISTRAL_SIMD static __m512i look_up(__m512i values) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTable4));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), values);
  }

  // For each of 16 words the word that has its further bits. `all`: those of the super-block.
  MISTRAL_SIMD static __m512i further_words(const char* all, int i) {
    if (kBits == 5) {
      const __m512i words = _mm512_castsi256_si512(load_32(all));
      return _mm512_permutexvar_epi32(lanes_of([&](int lane) { return 4 * i + lane / 4; }), words);
    }
    if (kBits == 6) {
      const auto at = [&](int lane) { return lane % 4 / 2 * 8 + 4 * i + lane / 4; };
      return _mm512_permutexvar_epi32(lanes_of(at), _mm512_loadu_si512(all));
    }
    return _mm512_setzero_si512();
  }

  // Moves the further bits of the low or the high halves of bytes above their four bits.
  MISTRAL_SIMD static __m512i further_bits(__m512i words, int half) {
    const auto shift = [&](int lane) {
      const int bit =
          kBits == 5 ? fifth_bit_shift(lane % 4, 4 * half) : high_bits_shift(lane % 4, 4 * half);
      return (4 - bit + 32) % 32;
    };
    const __m512i moved = _mm512_rolv_epi32(words, lanes_of(shift));
    return _mm512_and_si512(moved, _mm512_set1_epi8(kBits == 5 ? 0x10 : 0x30));
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

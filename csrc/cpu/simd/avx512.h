// The part of simd.h for AVX-512: one vector of 16 floats.
#pragma once

#include <immintrin.h>

namespace mistral::cpu::MISTRAL_ISA {

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

MISTRAL_SIMD Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
MISTRAL_SIMD Vec broadcast(f16 x) {
  return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x.bits)))};
}

MISTRAL_SIMD Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
MISTRAL_SIMD Vec load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
MISTRAL_SIMD Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

MISTRAL_SIMD Vec load(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw))};
}

MISTRAL_SIMD void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
MISTRAL_SIMD void store(bf16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i out = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
MISTRAL_SIMD void store(f16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

MISTRAL_SIMD Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// vmin and vmax return b if a or b is NaN, as the instructions do.
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n, for integers n.
MISTRAL_SIMD Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

MISTRAL_SIMD float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
MISTRAL_SIMD float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// out[i] = the sum of the lanes of a[i]. This takes fewer steps than four separate sums.
MISTRAL_SIMD void sum4(const Vec a[4], float* out) {
  __m128 quarter[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm512_extractf32x8_ps(a[i].v, 1));
    quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _mm_storeu_ps(
      out, _mm_hadd_ps(_mm_hadd_ps(quarter[0], quarter[1]), _mm_hadd_ps(quarter[2], quarter[3])));
}

// 16 words of 32 bits. Each word holds 8 values of 4 bits (csrc/formats.h).
struct Words {
  __m512i v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  __m512i words = _mm512_loadu_si512(p);
  asm("" : "+v"(words));  // keeps them in a register; GCC would load them again for each value
  return {words};
}
// The signed value i of every word.
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  // The table look-up reads the low 4 bits of each word and ignores the others.
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, int4_shift(i)), values)};
}
// (word >> shift) & mask
MISTRAL_SIMD Words field(Words w, int shift, int mask) {
  return {_mm512_and_si512(_mm512_srli_epi32(w.v, static_cast<unsigned>(shift)),
                           _mm512_set1_epi32(mask))};
}
// a | b << shift
MISTRAL_SIMD Words join(Words a, Words b, int shift) {
  return {_mm512_or_si512(a.v, _mm512_slli_epi32(b.v, static_cast<unsigned>(shift)))};
}
MISTRAL_SIMD Words flip_bit(Words w, int bit) {
  return {_mm512_xor_si512(w.v, _mm512_set1_epi32(1 << bit))};
}
MISTRAL_SIMD Vec to_vec(Words w) { return {_mm512_cvtepi32_ps(w.v)}; }
// The elements of kTable4 whose indices are the words, each 0 to 15.
MISTRAL_SIMD Vec look_up(Words w) {
  return {_mm512_permutexvar_ps(w.v, _mm512_load_ps(kFloatTable4.values))};
}
// The bf16 scales of one or two neighbouring vectors of words. `load` loads them together, and
// of_chunk gives each lane of vector i its scale. A lane has a word of 8 values. 2^group_log2
// neighbouring values share a scale.
struct GroupScales {
  // index[i] has, for each lane of vector i, the index of its scale among the loaded 16-bit
  // elements. It is in the high half of the lane, where the scale goes: a bf16 is the high half of
  // a float.
  __m512i index[2];
  __mmask8 there;  // the scales that exist; others are not read

  using Loaded = __m512i;

  GroupScales(int group_log2, int64_t values) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i lanes_log2 = _mm_cvtsi32_si128(group_log2 - 3);
    for (int i = 0; i < 2; ++i) {
      const __m512i of_all = _mm512_add_epi32(lane, _mm512_set1_epi32(i * Vec::width));
      index[i] = _mm512_slli_epi32(_mm512_srl_epi32(of_all, lanes_log2), 16);
    }
    const int64_t count = mistral::max(1, mistral::min(values, 16 * Vec::width) >> group_log2);
    there = static_cast<__mmask8>((1 << count) - 1);
  }
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return _mm512_castsi128_si512(_mm_maskz_loadu_epi16(there, scales));
  }
  MISTRAL_SIMD Vec of_chunk(Loaded found, int i) const {
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, index[i], found))};
  }
};

#if defined(__AVX512BF16__)

#define MISTRAL_BF16_PAIRS

// 16 pairs of bf16. One instruction adds the products of pairs to the 16 lanes of a Vec.
//
// They are loaded as the type that the instruction takes. If they were loaded as integers, GCC 12
// would move many of them from register to register through memory.
struct Pairs {
  __m512bh v;

  __m512i integers() const { return reinterpret_cast<__m512i>(v); }
};
using UnalignedPairs __attribute__((aligned(1), may_alias)) = __m512bh;
MISTRAL_SIMD Pairs pairs_of(__m512i x) { return {reinterpret_cast<__m512bh>(x)}; }
MISTRAL_SIMD Pairs load_pairs(const bf16* p) {
  return {*reinterpret_cast<const UnalignedPairs*>(p)};
}
MISTRAL_SIMD void store_pairs(bf16* p, Pairs x) { *reinterpret_cast<UnalignedPairs*>(p) = x.v; }
MISTRAL_SIMD Pairs broadcast_pair(const bf16* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);
  return pairs_of(_mm512_set1_epi32(pair));
}
MISTRAL_SIMD Vec dot(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
// Rounds the lanes of `first`, then the lanes of `second`, to bf16.
MISTRAL_SIMD Pairs to_pairs(Vec first, Vec second) {
  return {_mm512_cvtne2ps_pbh(second.v, first.v)};
}
// Values 2 i and 2 i + 1 of every word, as bf16.
MISTRAL_SIMD Pairs int4_pair(Words w, int i) {
  // The look-up reads 5 bits of each 16-bit element. The highest of these bits belongs to another
  // value, so the table holds each of the 16 numbers twice.
  const __m512i values = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                        int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
                        int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80)));
  return pairs_of(_mm512_permutexvar_epi16(_mm512_srli_epi16(w.v, 4 * i), values));
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

// The part of simd.h for AVX2: one vector of 8 floats. avx512.h has the comments on its functions.
#pragma once

#include <immintrin.h>

namespace mistral::cpu::MISTRAL_ISA {

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

MISTRAL_SIMD Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
MISTRAL_SIMD Vec broadcast(f16 x) {
  return {_mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(x.bits)))};
}

MISTRAL_SIMD Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
MISTRAL_SIMD Vec load(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
MISTRAL_SIMD Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

MISTRAL_SIMD Vec load(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw))};
}

MISTRAL_SIMD void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
MISTRAL_SIMD void store(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i low = _mm256_castsi256_si128(out), high = _mm256_extracti128_si256(out, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
MISTRAL_SIMD void store(f16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

MISTRAL_SIMD Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MISTRAL_SIMD Vec scale_by_power(Vec a, Vec n) {
  // 2^n is split into two factors, because it may itself be too small or too large for a normal
  // float.
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {
      _mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}

MISTRAL_SIMD float sum(Vec a) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 h = _mm_hadd_ps(q, q);
  return _mm_cvtss_f32(_mm_hadd_ps(h, h));
}
MISTRAL_SIMD float largest(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
MISTRAL_SIMD void sum4(const Vec a[4], float* out) {
  __m128 half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm_add_ps(_mm256_castps256_ps128(a[i].v), _mm256_extractf128_ps(a[i].v, 1));
  }
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(half[0], half[1]), _mm_hadd_ps(half[2], half[3])));
}

struct Words {
  __m256i v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  const __m256i high = _mm256_slli_epi32(w.v, 28 - int4_shift(i));
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(high, 28))};
}
MISTRAL_SIMD Words field(Words w, int shift, int mask) {
  return {_mm256_and_si256(_mm256_srli_epi32(w.v, shift), _mm256_set1_epi32(mask))};
}
MISTRAL_SIMD Words join(Words a, Words b, int shift) {
  return {_mm256_or_si256(a.v, _mm256_slli_epi32(b.v, shift))};
}
MISTRAL_SIMD Words flip_bit(Words w, int bit) {
  return {_mm256_xor_si256(w.v, _mm256_set1_epi32(1 << bit))};
}
MISTRAL_SIMD Vec to_vec(Words w) { return {_mm256_cvtepi32_ps(w.v)}; }
MISTRAL_SIMD Vec look_up(Words w) {
  const __m256 low = _mm256_load_ps(kFloatTable4.values);
  const __m256 high = _mm256_load_ps(kFloatTable4.values + 8);
  // Bit 3 of an index chooses the half of the table. It is moved to the sign bit, which blendv
  // reads.
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(w.v, 28));
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, w.v), _mm256_permutevar8x32_ps(high, w.v),
                           is_high)};
}
struct GroupScales {
  int group_log2;
  bool two;  // the words of a vector are in two groups, so each half of the lanes has its own scale

  using Loaded = const bf16*;

  GroupScales(int group_log2, int64_t values)
      : group_log2(group_log2), two(mistral::min(values, 8 * Vec::width) >> group_log2 > 1) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return reinterpret_cast<const bf16*>(scales);
  }
  MISTRAL_SIMD Vec of_chunk(Loaded scales, int i) const {
    scales += i * 8 * Vec::width >> group_log2;
    const __m128 first = _mm_set1_ps(to_float(scales[0]));
    return {_mm256_set_m128(two ? _mm_set1_ps(to_float(scales[1])) : first, first)};
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

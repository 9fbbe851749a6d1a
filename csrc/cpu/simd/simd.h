// One vector of floats, as wide as the instruction set that this file is compiled for: 16 lanes
// (AVX-512), 8 (AVX2), 4 (NEON, in neon.h) or 1 (everywhere). Kernels are written once against it;
// with one lane they are their own plain scalar specification.
//
// 16-bit types are widened on load and rounded to nearest even on store.
#pragma once

#include <cmath>
#include <cstring>

#include "../../linear.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// MISTRAL_NEON is a flag of the build: the scalar set of aarch64 is compiled with NEON too.
//
// MISTRAL_VECTORS: a vector has several lanes, and there are vectors of integers (integers.h).
// MISTRAL_BYTE_PRODUCTS: on x86, an instruction adds up the products of four bytes.
#if defined(__AVX2__) || defined(MISTRAL_NEON)
#define MISTRAL_VECTORS
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define MISTRAL_BYTE_PRODUCTS
#endif
// The instructions of VNNI exist in two encodings: that of AVX-512, and that of AVX-VNNI, which
// lacks half of the registers that a compiler for AVX-512 uses.
#if defined(__AVXVNNI__) && !defined(__AVX512VL__)
#define MISTRAL_VNNI "%{vex%} "
#else
#define MISTRAL_VNNI
#endif

#define MISTRAL_SIMD [[gnu::always_inline]] inline

namespace mistral::cpu::MISTRAL_ISA {

// Scalar conversions: all that the scalar set uses. The other sets use them for the last few
// elements of a row.

MISTRAL_SIMD float to_float(float x) { return x; }
MISTRAL_SIMD float to_float(int8_t x) { return x; }

MISTRAL_SIMD float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

MISTRAL_SIMD float to_float(f16 x) {
  // Shift exponent and mantissa to their places in a float and rescale by 2^(127 - 15): exact,
  // also for subnormals. Infinity and NaN keep the largest exponent.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  float scaled;
  memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof bits);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits = magnitude | 0x7f800000u;
  bits |= sign;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

MISTRAL_SIMD void from_float(float x, float* out) { *out = x; }

MISTRAL_SIMD void from_float(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest even
  out->bits = static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
}

MISTRAL_SIMD void from_float(float x, f16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to 65520 or more: infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value, in units of 2^-24 and rounded to nearest even by
    // the addition itself, in the low bits of the sum.
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    memcpy(&half, &value, sizeof half);
    half -= 0x3f000000u;
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    half = (rounded - (uint32_t{127 - 15} << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// kTable4 as floats.
struct FloatTable4 {
  alignas(64) float values[16];
};
constexpr FloatTable4 float_table() {
  FloatTable4 table{};
  for (int i = 0; i < 16; ++i) table.values[i] = kTable4[i];
  return table;
}
constexpr FloatTable4 kFloatTable4 = float_table();

#if defined(__AVX512F__)

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
// b where either is NaN, as the instruction has it
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
MISTRAL_SIMD Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n, n whole
MISTRAL_SIMD Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

MISTRAL_SIMD float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
MISTRAL_SIMD float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// out[i] = sum of a[i], in fewer steps than four separate sums
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

// 16 words of 32 bits, each of 8 values of 4 bits (csrc/formats.h)
struct Words {
  __m512i v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  __m512i words = _mm512_loadu_si512(p);
  asm("" : "+v"(words));  // in a register: GCC would load it again for each value
  return {words};
}
// value i of every word
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  // A table look-up takes the low 4 bits of each word and ignores the others.
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
// kTable4 of words from 0 to 15
MISTRAL_SIMD Vec look_up(Words w) {
  return {_mm512_permutexvar_ps(w.v, _mm512_load_ps(kFloatTable4.values))};
}
// Loads the scales of one or two Words, whose values share scales in groups of 2^group_log2. Each
// lane has 8 values.
struct GroupScales {
  // The index of each lane's scale, in the high half: a bf16 is the high half of a float.
  __m512i index[2];
  __mmask8 there;  // mask of the scales that exist

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

// 16 pairs of bf16, whose products one instruction adds to the 16 lanes of a Vec
struct Pairs {
  __m512i v;
};
MISTRAL_SIMD Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
MISTRAL_SIMD void store_pairs(bf16* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
MISTRAL_SIMD Pairs broadcast_pair(const bf16* p) {
  int pair;
  memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
MISTRAL_SIMD Vec dot(Pairs a, Pairs b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// the lanes of `first`, then those of `second`, rounded
MISTRAL_SIMD Pairs to_pairs(Vec first, Vec second) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v))};
}
// values 2 i and 2 i + 1 of every word
MISTRAL_SIMD Pairs int4_pair(Words w, int i) {
  // The look-up takes 5 bits of each half word. The highest belongs to another value, so the table
  // holds each of the 16 values twice.
  const __m512i values = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                        int16_t(0xc100), int16_t(0xc0e0), int16_t(0xc0c0), int16_t(0xc0a0),
                        int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80)));
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(w.v, 4 * i), values)};
}

#endif

#elif defined(__AVX2__)

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
  // 2^n in two factors, so that the smallest results may be subnormal.
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
  // Bit 3 becomes the sign, which blendv chooses by.
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(w.v, 28));
  return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, w.v), _mm256_permutevar8x32_ps(high, w.v),
                           is_high)};
}
struct GroupScales {
  int group_log2;
  bool two;  // a scale for each half of the lanes

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

#elif defined(MISTRAL_NEON)

}  // namespace mistral::cpu::MISTRAL_ISA
#include "neon.h"
namespace mistral::cpu::MISTRAL_ISA {

#else

struct Vec {
  static constexpr int width = 1;
  float v;
};

MISTRAL_SIMD Vec broadcast(float x) { return {x}; }
MISTRAL_SIMD Vec broadcast(f16 x) { return {to_float(x)}; }

template <class T>
MISTRAL_SIMD Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
MISTRAL_SIMD void store(T* p, Vec x) {
  from_float(x.v, p);
}

MISTRAL_SIMD Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
MISTRAL_SIMD Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
MISTRAL_SIMD Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
MISTRAL_SIMD Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
MISTRAL_SIMD Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

MISTRAL_SIMD float sum(Vec a) { return a.v; }
MISTRAL_SIMD float largest(Vec a) { return a.v; }
MISTRAL_SIMD void sum4(const Vec a[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = a[i].v;
}

struct Words {
  uint32_t v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  Words w;
  memcpy(&w.v, p, sizeof w.v);
  return w;
}
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  return {static_cast<float>(static_cast<int32_t>(w.v << (28 - int4_shift(i))) >> 28)};
}
MISTRAL_SIMD Words field(Words w, int shift, int mask) {
  return {w.v >> shift & static_cast<uint32_t>(mask)};
}
MISTRAL_SIMD Words join(Words a, Words b, int shift) { return {a.v | b.v << shift}; }
MISTRAL_SIMD Words flip_bit(Words w, int bit) { return {w.v ^ 1u << bit}; }
MISTRAL_SIMD Vec to_vec(Words w) { return {static_cast<float>(w.v)}; }
MISTRAL_SIMD Vec look_up(Words w) { return {kFloatTable4.values[w.v]}; }
struct GroupScales {
  using Loaded = const bf16*;

  GroupScales(int, int64_t) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return reinterpret_cast<const bf16*>(scales);
  }
  MISTRAL_SIMD Vec of_chunk(Loaded scales, int) const { return broadcast(to_float(scales[0])); }
};

#endif

#if defined(MISTRAL_VECTORS)

// exp(x) to about 2 units in the last place. With x = n ln 2 + r, |r| <= ln 2 / 2:
// exp(x) = 2^n exp(r), and exp(r) is its Taylor series. NaN stays NaN; exp(-inf) is 0.
MISTRAL_SIMD Vec exp(Vec x) {
  // Beyond these bounds the result is 0 or infinity anyhow, and n stays a small integer.
  const Vec clamped = vmin(broadcast(89.0f), vmax(broadcast(-104.0f), x));
  const Vec n = round(clamped * broadcast(1.44269504f));
  // ln 2 in two parts, the first short enough that n times it is exact
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped));
  Vec series = broadcast(1.0f / 5040);
  const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int i = 0; i < 7; ++i) series = fma(series, r, broadcast(coefficients[i]));
  return scale_by_power(series, n);
}

#else

MISTRAL_SIMD Vec exp(Vec x) { return {expf(x.v)}; }

#endif

MISTRAL_SIMD Vec silu(Vec x) { return x / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }

// The last n < width elements of a row; lanes past them are 0 and are not stored.
template <class T>
MISTRAL_SIMD Vec load_first(const T* p, int64_t n) {
  T buffer[Vec::width] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
MISTRAL_SIMD void store_first(T* p, Vec x, int64_t n) {
  T buffer[Vec::width];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// x rounded to T and back, as if it had gone through memory
template <class T>
MISTRAL_SIMD Vec round_to(Vec x) {
  T buffer[Vec::width];
  store(buffer, x);
  return load(buffer);
}
template <>
MISTRAL_SIMD Vec round_to<float>(Vec x) {
  return x;
}

// The lanes of two vectors in turn: a0 b0 a1 b1 ..., in two vectors.
#if defined(__AVX512F__)
MISTRAL_SIMD void interleave(Vec a, Vec b, Vec out[2]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  out[0] = {_mm512_permutex2var_ps(a.v, low, b.v)};
  out[1] = {_mm512_permutex2var_ps(a.v, high, b.v)};
}
#elif defined(__AVX2__)
MISTRAL_SIMD void interleave(Vec a, Vec b, Vec out[2]) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  out[0] = {_mm256_permute2f128_ps(low, high, 0x20)};
  out[1] = {_mm256_permute2f128_ps(low, high, 0x31)};
}
#elif !defined(MISTRAL_NEON)
MISTRAL_SIMD void interleave(Vec a, Vec b, Vec out[2]) {
  out[0] = a;
  out[1] = b;
}
#endif

#if defined(__AVX512BF16__)
MISTRAL_SIMD void interleave(Pairs a, Pairs b, Pairs out[2]) {
  Vec halves[2];
  interleave(Vec{_mm512_castsi512_ps(a.v)}, Vec{_mm512_castsi512_ps(b.v)}, halves);
  for (int i = 0; i < 2; ++i) out[i] = {_mm512_castps_si512(halves[i].v)};
}
// Pairs value i of `a` with value i of `b`: first the values of the lower halves, then those of the
// upper halves.
MISTRAL_SIMD void pair_up(Pairs a, Pairs b, Pairs out[2]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Each lane holds the index of a value of a and, above it, the index of the same value of b.
  const __m512i low = _mm512_or_si512(_mm512_slli_epi32(lane, 16),
                                      _mm512_or_si512(lane, _mm512_set1_epi32(32 << 16)));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
  out[0] = {_mm512_permutex2var_epi16(a.v, low, b.v)};
  out[1] = {_mm512_permutex2var_epi16(a.v, high, b.v)};
}
#endif

// Transposes a square of lanes. Each round moves the highest bit of an element's row number to the
// lowest bit of its column number, and the highest bit of the column number to the lowest bit of
// the row number. After as many rounds as there are bits, row and column have changed places.
template <class Lanes>
MISTRAL_SIMD void transpose(Lanes rows[Vec::width]) {
  for (int round = Vec::width; round > 1; round /= 2) {
    Lanes next[Vec::width];
    for (int i = 0; i < Vec::width / 2; ++i) {
      interleave(rows[i], rows[i + Vec::width / 2], next + 2 * i);
    }
    for (int i = 0; i < Vec::width; ++i) rows[i] = next[i];
  }
}

// Lane i is the sum of the lanes of a[i]. This is the sum of the rows of the transpose, added while
// transposing.
MISTRAL_SIMD Vec sums(const Vec a[Vec::width]) {
  Vec left[Vec::width];
  for (int i = 0; i < Vec::width; ++i) left[i] = a[i];
  for (int count = Vec::width / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) {
      Vec halves[2];
      interleave(left[i], left[i + count], halves);
      left[i] = halves[0] + halves[1];
    }
  }
  return left[0];
}

// Each lane gets the largest value of its quarter of the vector. A vector of one lane stays as it
// is.
#if defined(__AVX512F__)
MISTRAL_SIMD Vec largest_of_quarter(Vec a) {
  a = vmax(a, Vec{_mm512_permute_ps(a.v, 0b10110001)});
  return vmax(a, Vec{_mm512_permute_ps(a.v, 0b01001110)});
}
#elif defined(__AVX2__)
MISTRAL_SIMD Vec largest_of_quarter(Vec a) {
  return vmax(a, Vec{_mm256_permute_ps(a.v, 0b10110001)});
}
#elif !defined(MISTRAL_NEON)
MISTRAL_SIMD Vec largest_of_quarter(Vec a) { return a; }
#endif

}  // namespace mistral::cpu::MISTRAL_ISA

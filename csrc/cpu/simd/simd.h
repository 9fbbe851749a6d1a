// A vector of floats. This file is compiled for every instruction set, and the vector is as wide as
// the set allows: 16 lanes (avx512.h), 8 (avx2.h), 4 (neon.h) or 1 (scalar.h). Most kernels are
// written once, for all widths. With one lane a kernel is plain scalar code, and tests/isas
// compares most kernels of the other sets with this code.
//
// Loads widen 16-bit types to fp32. Stores round to nearest even.
#pragma once

#include <cmath>
#include <cstring>

#include "../../linear.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The build sets MISTRAL_NEON. The compiler's own flag would not do: the scalar set of aarch64 is
// compiled with NEON, too.
//
// MISTRAL_VECTORS is defined if a vector has several lanes. Then there are vectors of integers, too
// (integers.h). MISTRAL_BYTE_PRODUCTS is defined if there is an x86 instruction that adds up four
// products of bytes.
#if defined(__AVX2__) || defined(MISTRAL_NEON)
#define MISTRAL_VECTORS
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define MISTRAL_BYTE_PRODUCTS
#endif
// The prefix of VNNI instructions in asm. They exist in two encodings, those of AVX-512 and of
// AVX-VNNI. With the encoding of AVX-VNNI only half of the registers of AVX-512 can be used, so
// only builds without AVX-512 use it.
#if defined(__AVXVNNI__) && !defined(__AVX512VL__)
#define MISTRAL_VNNI "%{vex%} "
#else
#define MISTRAL_VNNI
#endif

#define MISTRAL_SIMD [[gnu::always_inline]] inline

namespace mistral::cpu::MISTRAL_ISA {

// These functions convert single numbers. The scalar set has only these. The other sets use them
// for numbers such as scales and the last elements of a row.

MISTRAL_SIMD float to_float(float x) { return x; }
MISTRAL_SIMD float to_float(int8_t x) { return x; }

MISTRAL_SIMD float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

MISTRAL_SIMD float to_float(f16 x) {
  // Moves exponent and mantissa to their places in a float, and multiplies by 2^112, because
  // exponents have an offset of 15 in fp16 and of 127 in fp32. This is exact, also for subnormal
  // numbers. Infinity and NaN get the largest exponent.
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
    half = 0x7c00u;  // 65520 or more rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // A subnormal result is a whole number of units of 2^-24. The last bit of a float near 0.5
    // stands for 2^-24, too. So adding 0.5 rounds to a whole number of units, to nearest even, and
    // this number is in the low bits of the sum.
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

// The elements of kTable4 (csrc/formats.h) as floats.
struct FloatTable4 {
  alignas(64) float values[16];
};
constexpr FloatTable4 float_table() {
  FloatTable4 table{};
  for (int i = 0; i < 16; ++i) table.values[i] = kTable4[i];
  return table;
}
constexpr FloatTable4 kFloatTable4 = float_table();

}  // namespace mistral::cpu::MISTRAL_ISA

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(MISTRAL_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

namespace mistral::cpu::MISTRAL_ISA {

#if defined(MISTRAL_VECTORS)

// exp(x), right to about 2 units in the last place. Let x = n ln 2 + r with an integer n and |r| <=
// ln 2 / 2. Then exp(x) = 2^n exp(r). exp(r) is computed by its Taylor series. exp(NaN) is NaN, and
// exp(-inf) is 0.
MISTRAL_SIMD Vec exp(Vec x) {
  // Beyond these bounds the result is 0 or infinity in any case. Within them n is a small integer.
  const Vec clamped = vmin(broadcast(89.0f), vmax(broadcast(-104.0f), x));
  const Vec n = round(clamped * broadcast(1.44269504f));
  // ln 2 is split into two parts. The larger part has so few digits that its product with n is
  // exact.
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

// These functions load and store the first n lanes, at most all, for the last elements of a row.
// The load sets the other lanes to 0. The store does not write them.
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

// Rounds x to T and back, as if x had gone through memory.
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

// Interleaves the lanes of two vectors: a0 b0 a1 b1 and so on. out[0] has the first half of these
// lanes, out[1] the second half.
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
  interleave(Vec{_mm512_castsi512_ps(a.integers())}, Vec{_mm512_castsi512_ps(b.integers())},
             halves);
  for (int i = 0; i < 2; ++i) out[i] = pairs_of(_mm512_castps_si512(halves[i].v));
}
// Pairs value i of `a` with value i of `b`. out[0] has the pairs of the lower halves of `a` and
// `b`, out[1] those of the upper halves.
MISTRAL_SIMD void pair_up(Pairs a, Pairs b, Pairs out[2]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Each lane holds the index of a value of `a` and, above it, the index of the same value of `b`.
  const __m512i low = _mm512_or_si512(_mm512_slli_epi32(lane, 16),
                                      _mm512_or_si512(lane, _mm512_set1_epi32(32 << 16)));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
  out[0] = pairs_of(_mm512_permutex2var_epi16(a.integers(), low, b.integers()));
  out[1] = pairs_of(_mm512_permutex2var_epi16(a.integers(), high, b.integers()));
}
#endif

// Transposes a square of lanes, with a vector for each row. A round interleaves each row of the
// first half with the row half a square below it. The highest bit of an element's row number thus
// becomes the lowest bit of its column number, and the highest bit of the column number the lowest
// bit of the row number. After one round for each bit of these numbers, they have changed places.
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

// Lane i of the result is the sum of the lanes of a[i]. This is the sum of the rows of the
// transpose. The rows are added while the vectors are transposed.
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

// Each lane gets the largest value of its quarter of the vector. In attention/decode.h a quarter
// holds scores of one row. With 4 lanes or 1, the vector stays as it is.
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

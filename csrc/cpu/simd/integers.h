// Vectors of 16-bit integers. An instruction multiplies them and adds pairs of products. With
// AVX-512 VNNI there are vectors of bytes, too.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)

namespace mistral::cpu::MISTRAL_ISA {

struct Shorts {  // integers of 16 bits
  static constexpr int64_t width = 32;
  __m512i v;
};
struct Ints {  // 16 integers of 32 bits
  __m512i v;
};

MISTRAL_SIMD Shorts load_shorts(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
MISTRAL_SIMD Shorts broadcast_short(int16_t x) { return {_mm512_set1_epi16(x)}; }
MISTRAL_SIMD Shorts widen_bytes(const char* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Turns values of 4 bits from two's complement into unsigned values that are 8 larger.
MISTRAL_SIMD Words flip_int4_signs(Words w) {
  return {_mm512_xor_si512(w.v, _mm512_set1_epi8(static_cast<char>(0x88)))};
}
// Values 2 i and 2 i + 1 of each word. After a shift by 4 i they are the lowest bits of its halves
// (int4_shift in csrc/formats.h), which become lanes.
MISTRAL_SIMD Shorts int4_shorts(Words w, int i) {
  return {_mm512_and_si512(_mm512_srli_epi32(w.v, static_cast<unsigned>(4 * i)),
                           _mm512_set1_epi16(15))};
}

MISTRAL_SIMD Ints load_ints(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
MISTRAL_SIMD void store_ints(int16_t* p, Ints x) { _mm512_storeu_si512(p, x.v); }
MISTRAL_SIMD Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
MISTRAL_SIMD Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
MISTRAL_SIMD Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
MISTRAL_SIMD Ints operator<<(Ints x, int bits) { return {_mm512_slli_epi32(x.v, bits)}; }
MISTRAL_SIMD Vec to_vec(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
// Adds a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] to lane i.
MISTRAL_SIMD Ints add_pairs(Ints sums, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
  // This is asm for the reason given at add_products.
  asm("vpdpwssd %2, %1, %0" : "+v"(sums.v) : "v"(a.v), "vm"(b.v));
  return sums;
#else
  return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}

// Rounds to the nearest integers, which must fit 16 bits, and stores them.
MISTRAL_SIMD void store_rounded(int16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

#if defined(__AVX512VNNI__)

struct Bytes {  // 64 bytes
  __m512i v;
};

MISTRAL_SIMD Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
MISTRAL_SIMD Bytes broadcast_byte(int8_t x) { return {_mm512_set1_epi8(x)}; }
// Turns signed bytes into unsigned bytes that are 128 larger.
MISTRAL_SIMD Bytes add_128(Bytes x) { return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))}; }

// Adds to each 32-bit lane the sum of the products of 4 unsigned bytes and 4 signed bytes. This is
// asm, because with the intrinsic GCC 12 copies the sums to other registers and back in every
// iteration of a loop with many sums.
MISTRAL_SIMD Ints add_products(Ints sums, Bytes without_sign, Bytes with_sign) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(without_sign.v), "vm"(with_sign.v));
  return sums;
}

// Rounds to integers, which must fit 16 bits. Splits each into a signed high byte and an unsigned
// low byte, because add_products multiplies bytes. Stores high and low bytes apart.
MISTRAL_SIMD void split_rounded(Vec x, void* high, void* low) {
  const __m512i rounded = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128(static_cast<__m128i*>(high),
                   _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
  _mm_storeu_si128(static_cast<__m128i*>(low), _mm512_cvtepi32_epi8(rounded));
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

#elif defined(__AVX2__)

namespace mistral::cpu::MISTRAL_ISA {

struct Shorts {  // integers of 16 bits
  static constexpr int64_t width = 16;
  __m256i v;
};
struct Ints {  // 8 integers of 32 bits
  __m256i v;
};

MISTRAL_SIMD Shorts load_shorts(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
MISTRAL_SIMD Shorts broadcast_short(int16_t x) { return {_mm256_set1_epi16(x)}; }
MISTRAL_SIMD Shorts widen_bytes(const char* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// Turns values of 4 bits from two's complement into unsigned values that are 8 larger.
MISTRAL_SIMD Words flip_int4_signs(Words w) {
  return {_mm256_xor_si256(w.v, _mm256_set1_epi8(static_cast<char>(0x88)))};
}
// Values 2 i and 2 i + 1 of each word. After a shift by 4 i they are the lowest bits of its halves
// (int4_shift in csrc/formats.h), which become lanes.
MISTRAL_SIMD Shorts int4_shorts(Words w, int i) {
  return {_mm256_and_si256(_mm256_srli_epi32(w.v, 4 * i), _mm256_set1_epi16(15))};
}

MISTRAL_SIMD Ints load_ints(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
MISTRAL_SIMD void store_ints(int16_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v);
}
MISTRAL_SIMD Ints broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
MISTRAL_SIMD Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
MISTRAL_SIMD Vec to_vec(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
// Adds a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] to lane i.
MISTRAL_SIMD Ints add_pairs(Ints sums, Shorts a, Shorts b) {
#if defined(MISTRAL_BYTE_PRODUCTS)
  asm(MISTRAL_VNNI "vpdpwssd %2, %1, %0" : "+v"(sums.v) : "v"(a.v), "vm"(b.v));
  return sums;
#else
  return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(a.v, b.v))};
#endif
}

// Loads four scales in fp16. Each half of the vector holds all four.
MISTRAL_SIMD Vec load_four(const f16* p) {
  int64_t four;
  memcpy(&four, p, sizeof four);
  return {_mm256_cvtph_ps(_mm_set1_epi64x(four))};
}
// Scale i of four, in all lanes.
MISTRAL_SIMD Vec of_four(Vec four, int i) {
  switch (i) {  // the instruction takes only constants
    case 0: return {_mm256_permute_ps(four.v, 0x00)};
    case 1: return {_mm256_permute_ps(four.v, 0x55)};
    case 2: return {_mm256_permute_ps(four.v, 0xaa)};
    default: return {_mm256_permute_ps(four.v, 0xff)};
  }
}

// Rounds to the nearest integers, which must fit 16 bits, and stores them.
MISTRAL_SIMD void store_rounded(int16_t* p, Vec x) {
  const __m256i rounded = _mm256_cvtps_epi32(x.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}

}  // namespace mistral::cpu::MISTRAL_ISA

#elif defined(MISTRAL_NEON)
#include "integers_neon.h"
#endif

namespace mistral::cpu::MISTRAL_ISA {

// A unit of 16-bit integers: an integer stands for itself times `value`, which is a power of two.
// `inverse` is 1 / `value`.
struct Unit {
  float value;
  float inverse;
};

// The unit in which the largest of some numbers uses all bits of a 16-bit integer. `magnitude` is
// the largest magnitude of the numbers, as the bits of a float. Its exponent alone gives the unit.
//
// In this unit, a bf16 of at least 2^-7 times the largest number is exact. No number is off by more
// than 2^-15 times the largest. If the magnitude is infinite or NaN, the unit is NaN, which makes
// all products NaN. If the unit would be below the smallest normal number, it is that number, and
// the integers use fewer bits.
inline Unit unit_of(int32_t magnitude) {
  constexpr int32_t kExponent = 1 << 23, kInfinite = 255 * kExponent;
  const int32_t exponent = magnitude & kInfinite;
  if (exponent == kInfinite) return {NAN, 0.0f};
  const int32_t value_bits = mistral::max(exponent - 14 * kExponent, kExponent);
  const int32_t inverse_bits = 254 * kExponent - value_bits;
  Unit unit;
  memcpy(&unit.value, &value_bits, sizeof unit.value);
  memcpy(&unit.inverse, &inverse_bits, sizeof unit.inverse);
  return unit;
}

// The largest magnitude of `count` numbers, as the bits of a float. NaN counts as larger than
// infinity, as its bits do.
template <class T>
int32_t largest_magnitude(const T* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(x[i]);
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

}  // namespace mistral::cpu::MISTRAL_ISA

// Vectors of integers, whose products of bytes AVX-512 VNNI adds up.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__)

namespace mistral::cpu::MISTRAL_ISA {

struct Bytes {  // 64
  __m512i v;
};
struct Ints {  // 16 of 32 bits
  __m512i v;
};

MISTRAL_SIMD Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
MISTRAL_SIMD Bytes broadcast_byte(int8_t x) { return {_mm512_set1_epi8(x)}; }
// From signed to unsigned: 128 more.
MISTRAL_SIMD Bytes add_128(Bytes x) { return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))}; }

MISTRAL_SIMD Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
MISTRAL_SIMD Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
MISTRAL_SIMD Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
MISTRAL_SIMD Ints operator<<(Ints x, int bits) { return {_mm512_slli_epi32(x.v, bits)}; }
MISTRAL_SIMD Vec to_vec(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }

// Adds to each lane the products of 4 unsigned bytes with 4 signed ones. As an intrinsic, GCC 12
// copies the sums to other registers and back in every turn of a loop that has many.
MISTRAL_SIMD Ints add_products(Ints sums, Bytes without_sign, Bytes with_sign) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(without_sign.v), "vm"(with_sign.v));
  return sums;
}

// The largest magnitude of each lane, as bits: NaN is above infinity.
MISTRAL_SIMD Ints larger_magnitude(Ints a, Vec b) {
  const __m512i magnitude =
      _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_max_epi32(a.v, magnitude)};
}
MISTRAL_SIMD int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x.v); }

// The nearest integers, of at most 16 bits: their signed high bytes and their unsigned low ones.
MISTRAL_SIMD void split_rounded(Vec x, void* high, void* low) {
  const __m512i rounded = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128(static_cast<__m128i*>(high),
                   _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
  _mm_storeu_si128(static_cast<__m128i*>(low), _mm512_cvtepi32_epi8(rounded));
}

}  // namespace mistral::cpu::MISTRAL_ISA

#endif

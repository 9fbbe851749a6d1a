// Vectors of 256 bits for products of 8-bit integers. All sets but the scalar set have them.
#pragma once

#include "simd.h"

#if defined(__AVX2__)

namespace mistral::cpu::MISTRAL_ISA {

using Bytes32 = __m256i;
using Lanes8 = __m256;  // 8 floats

MISTRAL_SIMD Bytes32 load_32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
MISTRAL_SIMD void store_32(void* p, Bytes32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
MISTRAL_SIMD Bytes32 zero_bytes() { return _mm256_setzero_si256(); }
// Loads the first `count` bytes, at most 32. The other bytes become zeros.
MISTRAL_SIMD Bytes32 load_first_bytes(const char* p, int64_t count) {
  switch (count) {  // avoids a copy through memory, which would delay the load
    case 32: return load_32(p);
    case 16: return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    case 8: return _mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    default: break;
  }
  alignas(32) char all[32] = {};
  memcpy(all, p, static_cast<size_t>(count));
  return load_32(all);
}
MISTRAL_SIMD Bytes32 mask_bytes(Bytes32 x, char mask) {
  return _mm256_and_si256(x, _mm256_set1_epi8(mask));
}
// Rounds the 32 products x * factor to the nearest integers, which must fit bytes.
MISTRAL_SIMD Bytes32 round_32(const float* x, float factor) {
  __m256i parts[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor));
    parts[i] = _mm256_cvtps_epi32(scaled);
  }
  // The pack instructions work on each half of a vector, which mixes the words. The permutation
  // puts them in order again.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(parts[0], parts[1]),
                                           _mm256_packs_epi32(parts[2], parts[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
// In each half, byte i of the result is byte order[i] of the same half of x.
MISTRAL_SIMD Bytes32 shuffle_halves(Bytes32 x, const int8_t order[16]) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(half));
}
// out[i] = the sum of the signed bytes 4 i to 4 i + 3.
MISTRAL_SIMD void store_sums_of_fours(int32_t out[8], Bytes32 x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
  store_32(out, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Adds products of unsigned and signed bytes to sums. With VNNI a sum is a lane of 32 bits and gets
// 4 products. Otherwise it is a lane of 16 bits and gets 2 products, and the caller must keep it
// from overflowing.
#if defined(MISTRAL_BYTE_PRODUCTS)
constexpr bool kSumsOf32Bits = true;
MISTRAL_SIMD __m256i add_byte_products(__m256i sums, Bytes32 without_sign, Bytes32 with_sign) {
  // This is asm for the reason given at add_products (integers.h).
  asm(MISTRAL_VNNI "vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(without_sign), "vm"(with_sign));
  return sums;
}
// Converts the sums to lanes of 32 bits. Here they are in such lanes already.
MISTRAL_SIMD __m256i widen_sums(__m256i sums) { return sums; }
#else
constexpr bool kSumsOf32Bits = false;
MISTRAL_SIMD __m256i add_byte_products(__m256i sums, Bytes32 without_sign, Bytes32 with_sign) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(without_sign, with_sign));
}
MISTRAL_SIMD __m256i widen_sums(__m256i sums) {
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}
#endif

// Makes the compiler add sums in the order of the code. GCC would add them in a tree. With several
// sums, a tree needs more registers than there are.
MISTRAL_SIMD void keep_order(__m256i& sums) { asm("" : "+v"(sums)); }

// In the vectors below, each of 8 blocks of 32 values has a 32-bit lane. Even blocks have lanes 0
// to 3 and odd blocks lanes 4 to 7, because the instructions of words_to_lanes move words within a
// half of a vector only. This is the lane of a block.
constexpr int lane_of(int block) { return block % 2 * 4 + block / 2; }
// `in` holds 4 words of each of 8 blocks, one block after another. Moves word i of each block to
// its lane of out[i].
MISTRAL_SIMD void words_to_lanes(const __m256i in[4], __m256i out[4]) {
  const __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
  const __m256i c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
  out[0] = _mm256_unpacklo_epi64(a, b);
  out[1] = _mm256_unpackhi_epi64(a, b);
  out[2] = _mm256_unpacklo_epi64(c, d);
  out[3] = _mm256_unpackhi_epi64(c, d);
}
// Loads 8 words, one for each block, and puts them in the lanes of their blocks.
MISTRAL_SIMD __m256i load_blocks_to_lanes(const char* words) {
  const __m128 first = _mm_loadu_ps(reinterpret_cast<const float*>(words));
  const __m128 last = _mm_loadu_ps(reinterpret_cast<const float*>(words + 16));
  return _mm256_castps_si256(_mm256_set_m128(_mm_shuffle_ps(first, last, 0b11011101),
                                             _mm_shuffle_ps(first, last, 0b10001000)));
}
MISTRAL_SIMD void store_lanes(float* p, Lanes8 x) { _mm256_storeu_ps(p, x); }
// Lane i of the result is the sum of the lanes of x[i].
MISTRAL_SIMD Lanes8 sums_of_lanes(const Lanes8 x[8]) {
  __m256 fours[2];
  for (int i = 0; i < 2; ++i) {
    const __m256* four = x + 4 * i;
    fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                       _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}

}  // namespace mistral::cpu::MISTRAL_ISA

#elif defined(MISTRAL_NEON)
#include "bytes_neon.h"
#endif

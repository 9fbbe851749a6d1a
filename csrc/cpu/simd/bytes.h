// Vectors of 256 bits for products of 8-bit integers, on processors with AVX2 and wider ones alike.
#pragma once

#include "simd.h"

#if defined(__AVX2__)

namespace mistral::cpu::MISTRAL_ISA {

using Bytes32 = __m256i;

MISTRAL_SIMD Bytes32 load_32(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// The first `count` bytes, at most 32, then zeros.
MISTRAL_SIMD Bytes32 load_first_bytes(const char* p, int64_t count) {
  switch (count) {  // without a copy that the load has to wait for
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
// The 16-bit sums of pairs of products of unsigned and signed bytes, which must fit.
MISTRAL_SIMD __m256i multiply_bytes(Bytes32 without_sign, Bytes32 with_sign) {
  return _mm256_maddubs_epi16(without_sign, with_sign);
}
// The same of signed bytes above -128.
MISTRAL_SIMD __m256i multiply_signed(Bytes32 a, Bytes32 b) {
  return _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(a, b));
}
// The 32-bit sums of pairs of 16-bit integers.
MISTRAL_SIMD __m256i add_neighbours(__m256i x) {
  return _mm256_madd_epi16(x, _mm256_set1_epi16(1));
}

// Words 4 b + i of 8 blocks b become lane lane_of(b) of out[i]; lane l has block block_at(l).
constexpr int block_at(int lane) { return 2 * (lane % 4) + lane / 4; }
MISTRAL_SIMD void words_to_lanes(const __m256i in[4], __m256i out[4]) {
  const __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpacklo_epi32(in[2], in[3]);
  const __m256i c = _mm256_unpackhi_epi32(in[0], in[1]), d = _mm256_unpackhi_epi32(in[2], in[3]);
  out[0] = _mm256_unpacklo_epi64(a, b);
  out[1] = _mm256_unpackhi_epi64(a, b);
  out[2] = _mm256_unpacklo_epi64(c, d);
  out[3] = _mm256_unpackhi_epi64(c, d);
}
// A word of each block, in the order of lanes.
MISTRAL_SIMD __m256i blocks_to_lanes(__m256i x) {
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
MISTRAL_SIMD float sum_of_lanes(__m256 x) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 h = _mm_hadd_ps(q, q);
  return _mm_cvtss_f32(_mm_hadd_ps(h, h));
}

}  // namespace mistral::cpu::MISTRAL_ISA

#endif

// Vectors that mix four rows, for products of integers on AVX-512 with VNNI. The sums of four rows
// come to lie in one vector, so one conversion to floats serves all four.
//
// A vector from memory belongs to one row. Each of its 128-bit lanes has four words of 32 bits, at
// places 0 to 3. Mixed vector j, 0 to 3, has word p of row p ^ j (exclusive or) at place p of each
// lane. In mixed vector 1, for example, places 0 to 3 belong to rows 1, 0, 3 and 2. No word changes
// its place, so all mixed vectors are multiplied by the same activations. In the products of mixed
// vector j, row r is at place r ^ j. Swaps bring it to place r before the products of different
// mixed vectors are added.
#pragma once

#include "../simd/integers.h"

#if defined(__AVX512VNNI__)

namespace mistral::cpu::MISTRAL_ISA {

// Mixes two pairs of rows. `a` has words of rows 0 and 1 alternately, and `b` has those of rows 1
// and 0. `c` and `d` have those of rows 2 and 3 in the same way.
MISTRAL_SIMD void mix_pairs(__m512i a, __m512i b, __m512i c, __m512i d, __m512i (&mixed)[4]) {
  mixed[0] = _mm512_mask_blend_epi32(0xcccc, a, c);
  mixed[1] = _mm512_mask_blend_epi32(0xcccc, b, d);
  mixed[2] = _mm512_mask_blend_epi32(0xcccc, c, a);
  mixed[3] = _mm512_mask_blend_epi32(0xcccc, d, b);
}

MISTRAL_SIMD void mix_rows(const __m512i (&rows)[4], __m512i (&mixed)[4]) {
  const auto alternate = [&](int even, int odd) {
    return _mm512_mask_blend_epi32(0xaaaa, rows[even], rows[odd]);
  };
  mix_pairs(alternate(0, 1), alternate(1, 0), alternate(2, 3), alternate(3, 2), mixed);
}

// In each 128-bit lane, swap_neighbours swaps places 0 and 1, and places 2 and 3. swap_pairs swaps
// places 0 and 2, and places 1 and 3.
MISTRAL_SIMD Ints swap_neighbours(Ints x) { return {_mm512_shuffle_epi32(x.v, _MM_PERM_CDAB)}; }
MISTRAL_SIMD Ints swap_pairs(Ints x) { return {_mm512_shuffle_epi32(x.v, _MM_PERM_BADC)}; }

// Adds the four 128-bit lanes of x, place by place.
MISTRAL_SIMD __m128 sums_of_places(__m512 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
// out[4 i + r] = place r of x[i], added over the four lanes: the result of row r.
MISTRAL_SIMD void store_row_sums(const __m512 (&x)[8], float* out) {
  for (int i = 0; i < 8; ++i) _mm_storeu_ps(out + 4 * i, sums_of_places(x[i]));
}
// out[i] = the sum of x[i], whose places all belong to one row and hold the same numbers. So place
// 0 of the four lanes is enough.
MISTRAL_SIMD void store_sums_of_one(const __m512 (&x)[8], float* out) {
  for (int i = 0; i < 8; ++i) out[i] = _mm_cvtss_f32(sums_of_places(x[i]));
}

}  // namespace mistral::cpu::MISTRAL_ISA

#endif

// Finds the elements of kTable4 that are nearest to given numbers, 32 numbers at a time, and writes
// the indices of the elements as words.
#pragma once

#include "bytes.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int kGroup4 = 32;  // the number of numbers that a call converts

// The index of the element of kTable4 that is nearest to x. Half-way between two elements it takes
// the larger.
constexpr int nearest_index(int x) {
  int index = 0;
  for (int i = 1; i < 16; ++i) index += 2 * x >= kTable4[i - 1] + kTable4[i];
  return index;
}

// A bucket is 16 neighbouring integers, from a multiple of 16 on. Bucket i has the integers whose
// high four bits, as bytes, are i. The integers of a bucket have at most two different nearest
// indices.
struct Buckets {
  int8_t first[16];  // the nearest index of the smallest integer of the bucket
  int8_t last[16];   // the largest integer with that index; 127: all have it
};
constexpr Buckets buckets() {
  Buckets b{};
  for (int begin = -128; begin < 128; begin += 16) {
    const int bits = begin >> 4 & 15, first = nearest_index(begin);
    b.first[bits] = static_cast<int8_t>(first);
    b.last[bits] = 127;
    for (int x = begin; x < begin + 16; ++x) {
      if (nearest_index(x) == first + 1 && b.last[bits] == 127) {
        b.last[bits] = static_cast<int8_t>(x - 1);
      }
    }
  }
  return b;
}
constexpr Buckets kBuckets = buckets();

constexpr bool two_indices_at_most() {
  for (int x = -128; x < 128; ++x) {
    const int bits = x >> 4 & 15;
    if (nearest_index(x) != kBuckets.first[bits] + (x > kBuckets.last[bits])) return false;
  }
  return true;
}
static_assert(two_indices_at_most(), "each bucket needs its first index and one comparison");

// The functions below round the numbers x * factor to integers first. This makes a difference only
// within 0.5 of the middle between two elements. If a product is NaN, its index may be any.

MISTRAL_SIMD int nearest_index(float x, float factor) {
  const float scaled = x * factor;
  const float clamped = scaled < 127 ? scaled > -127 ? scaled : -127 : 127;
  const float sum = clamped + 0x1.8p23f;  // the low bits hold the nearest integer
  int32_t bits;
  memcpy(&bits, &sum, sizeof bits);
  const auto rounded = static_cast<int8_t>(bits);
  const int bucket = rounded >> 4 & 15;
  return kBuckets.first[bucket] + (rounded > kBuckets.last[bucket]);
}

#if defined(__AVX2__)

// Loads 16 bytes into both halves of a vector.
MISTRAL_SIMD Bytes32 broadcast_16(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MISTRAL_SIMD Bytes32 nearest_indices(const float* x, float factor) {
  __m256i parts[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor));
    // The conversion turns a number that does not fit 32 bits into the smallest integer. This is
    // right for numbers that are too small. The minimum with 127 keeps the others from being too
    // large.
    parts[i] = _mm256_cvtps_epi32(_mm256_min_ps(scaled, _mm256_set1_ps(127)));
  }
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(parts[0], parts[1]),
                                           _mm256_packs_epi32(parts[2], parts[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const Bytes32 rounded = _mm256_permutevar8x32_epi32(mixed, order);
  const Bytes32 bits = mask_bytes(_mm256_srli_epi16(rounded, 4), 15);
  const Bytes32 first = _mm256_shuffle_epi8(broadcast_16(kBuckets.first), bits);
  const Bytes32 last = _mm256_shuffle_epi8(broadcast_16(kBuckets.last), bits);
  return _mm256_sub_epi8(first, _mm256_cmpgt_epi8(rounded, last));
}

MISTRAL_SIMD void nearest_values(const float* x, float factor, int8_t* out) {
  const Bytes32 values = _mm256_shuffle_epi8(broadcast_16(kTable4), nearest_indices(x, factor));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), values);
}

// Writes 32 indices as words in the layout of csrc/formats.h: value 2 j + k of a word is nibble j %
// 2 of byte 2 k + j / 2.
MISTRAL_SIMD void nearest_words(const float* x, float factor, uint32_t* out) {
  const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const Bytes32 nibbles = _mm256_shuffle_epi8(nearest_indices(x, factor), order);
  const __m256i bytes = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

#else

MISTRAL_SIMD void nearest_values(const float* x, float factor, int8_t* out) {
  for (int i = 0; i < kGroup4; ++i) out[i] = kTable4[nearest_index(x[i], factor)];
}

MISTRAL_SIMD void nearest_words(const float* x, float factor, uint32_t* out) {
  for (int word = 0; word < kGroup4 / 8; ++word) {
    out[word] = 0;
    for (int i = 0; i < 8; ++i) {
      out[word] |= static_cast<uint32_t>(nearest_index(x[8 * word + i], factor)) << int4_shift(i);
    }
  }
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

// Rounds numbers to the nearest elements of kTable4, the table of the formats iq4_nl and iq4_xs
// (csrc/formats.h). A call converts 32 numbers. It writes the elements themselves (nearest_values)
// or their 4-bit indices, 8 in a word (nearest_words).
#pragma once

#include "bytes.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int kGroup4 = 32;  // how many numbers a call converts

// The index of the element of kTable4 that is nearest to the number half / 2. If two elements are
// equally near, it is the index of the larger.
constexpr int nearest_index(int half) {
  int index = 0;
  for (int i = 1; i < 16; ++i) index += half >= kTable4[i - 1] + kTable4[i];
  return index;
}

// The *place* of a number x is the integer part of 2 x - kLowest. Numbers with the same place have
// the same nearest element, because the middle between two elements is a multiple of 1/2. 32
// neighbouring places are a bucket. The numbers of a bucket have at most two different nearest
// elements, so a look-up of the bucket and one comparison find the element. This is so only for few
// values of kLowest. Numbers below all buckets count as the first place, numbers above all buckets
// as the last.
constexpr int kLowest = -242, kBucketBits = 5, kBucketPlaces = 1 << kBucketBits;
constexpr int kPlaces = 16 * kBucketPlaces;

struct Buckets {
  int8_t first[16];  // the index of the first place of the bucket
  int8_t last[16];   // the last place, from 0 to 31, with that index
};
constexpr Buckets buckets() {
  Buckets b{};
  for (int i = 0; i < 16; ++i) {
    const int begin = kLowest + i * kBucketPlaces, first = nearest_index(begin);
    b.first[i] = static_cast<int8_t>(first);
    for (int place = 0; place < kBucketPlaces; ++place) {
      if (nearest_index(begin + place) == first) b.last[i] = static_cast<int8_t>(place);
    }
  }
  return b;
}
constexpr Buckets kBuckets = buckets();

constexpr bool two_indices_at_most() {
  for (int place = 0; place < kPlaces; ++place) {
    const int bucket = place / kBucketPlaces;
    const int later = place % kBucketPlaces > kBuckets.last[bucket];
    if (nearest_index(kLowest + place) != kBuckets.first[bucket] + later) return false;
  }
  return nearest_index(kLowest) == 0 && kBuckets.first[15] == 15;
}
static_assert(two_indices_at_most(), "each bucket needs its first index and one comparison");

// The functions below find the elements that are nearest to the numbers x * factor. For a product
// that is NaN or above 2^30 they may find any element. No finite weight, divided by the scale of
// its group, is so large.

MISTRAL_SIMD int place_of(float x, float factor) {
  const float exact = x * (2 * factor) - kLowest;
  return static_cast<int>(exact < kPlaces - 1 ? exact > 0 ? exact : 0 : kPlaces - 1);
}

MISTRAL_SIMD int index_at(int place) {
  const int bucket = place >> kBucketBits;
  return kBuckets.first[bucket] + ((place & (kBucketPlaces - 1)) > kBuckets.last[bucket]);
}

MISTRAL_SIMD int nearest_index(float x, float factor) { return index_at(place_of(x, factor)); }

#if defined(__AVX2__)

// Loads 16 bytes into both halves of a vector.
MISTRAL_SIMD Bytes32 broadcast_16(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

MISTRAL_SIMD Bytes32 nearest_indices(const float* x, float factor) {
  const __m256 twice = _mm256_set1_ps(2 * factor), lowest = _mm256_set1_ps(kLowest);
  __m256i parts[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 exact = _mm256_fmsub_ps(_mm256_loadu_ps(x + 8 * i), twice, lowest);
    parts[i] = _mm256_cvttps_epi32(exact);
  }
  // packus turns negative numbers into 0. Numbers above all buckets go to the last bucket, where
  // only one element is the nearest, so their place in it does not matter.
  const __m256i low = _mm256_packus_epi32(parts[0], parts[1]);
  const __m256i high = _mm256_packus_epi32(parts[2], parts[3]);
  const __m256i rest = _mm256_set1_epi16(kBucketPlaces - 1);
  const Bytes32 bucket = _mm256_min_epu8(_mm256_packus_epi16(_mm256_srli_epi16(low, kBucketBits),
                                                             _mm256_srli_epi16(high, kBucketBits)),
                                         _mm256_set1_epi8(15));
  const Bytes32 place =
      _mm256_packus_epi16(_mm256_and_si256(low, rest), _mm256_and_si256(high, rest));
  const Bytes32 first = _mm256_shuffle_epi8(broadcast_16(kBuckets.first), bucket);
  const Bytes32 last = _mm256_shuffle_epi8(broadcast_16(kBuckets.last), bucket);
  const Bytes32 mixed = _mm256_sub_epi8(first, _mm256_cmpgt_epi8(place, last));
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

MISTRAL_SIMD void nearest_values(const float* x, float factor, int8_t* out) {
  const Bytes32 values = _mm256_shuffle_epi8(broadcast_16(kTable4), nearest_indices(x, factor));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), values);
}

// Writes 32 indices as 4 words in the layout of csrc/formats.h. From its lowest bits up, a word
// holds its values in the order 0, 2, 4, 6, 1, 3, 5, 7.
MISTRAL_SIMD void nearest_words(const float* x, float factor, uint32_t* out) {
  const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const Bytes32 nibbles = _mm256_shuffle_epi8(nearest_indices(x, factor), order);
  const __m256i bytes = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

#else

// This loop only computes places, so that compilers vectorise it. They do not vectorise a loop that
// also looks up indices.
MISTRAL_SIMD void places_of(const float* x, float factor, int* places) {
  for (int i = 0; i < kGroup4; ++i) places[i] = place_of(x[i], factor);
}

MISTRAL_SIMD void nearest_values(const float* x, float factor, int8_t* out) {
  int places[kGroup4];
  places_of(x, factor, places);
  for (int i = 0; i < kGroup4; ++i) out[i] = kTable4[index_at(places[i])];
}

MISTRAL_SIMD void nearest_words(const float* x, float factor, uint32_t* out) {
  int places[kGroup4];
  places_of(x, factor, places);
  for (int word = 0; word < kGroup4 / 8; ++word) {
    out[word] = 0;
    for (int i = 0; i < 8; ++i) {
      out[word] |= static_cast<uint32_t>(index_at(places[8 * word + i])) << int4_shift(i);
    }
  }
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

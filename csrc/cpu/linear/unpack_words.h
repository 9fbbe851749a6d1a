// Unpacks the formats that consist of words (csrc/formats.h) to floats, a vector of words at a
// time. Only int4 is unpacked elsewhere, in unpack.h. Every value is fma(q, factor, offset), with a
// factor and an offset for each word. Both are exact, so nothing is rounded before this fma.
#pragma once

#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// How neighbouring values q are scaled: a weight is q * factor + offset.
struct Scaling {
  float factor;
  float offset;
};

MISTRAL_SIMD float half_at(const char* p) {
  f16 half;
  memcpy(&half, p, sizeof half);
  return to_float(half);
}
MISTRAL_SIMD int byte_at(const char* p) { return static_cast<uint8_t>(*p); }

// Finds the scale and the minimum of a block (0 to 7) of q4_k or q5_k. `bytes` are the 12 bytes in
// which a super-block (256 values) packs its scales and minima. Bytes 0 to 3 hold the scales of the
// first four blocks in their low 6 bits, and bytes 4 to 7 their minima. Bytes 8 to 11 hold the low
// 4 bits of the scales and minima of the last four blocks. Their high 2 bits are the top bits of
// bytes 0 to 7.
MISTRAL_SIMD void packed_scales(const char* bytes, int block, int* scale, int* minimum) {
  const int first_scale = byte_at(bytes + block % 4),
            first_minimum = byte_at(bytes + 4 + block % 4);
  if (block < 4) {
    *scale = first_scale & 63;
    *minimum = first_minimum & 63;
  } else {
    const int low = byte_at(bytes + 8 + block % 4);
    *scale = (low & 15) | first_scale >> 6 << 4;
    *minimum = low >> 4 | first_minimum >> 6 << 4;
  }
}

// The scaling of value k of a row. `scales` are the scales of this row.
template <WeightFormat format>
MISTRAL_SIMD Scaling scaling_at(const char* scales, int group_log2, int64_t k) {
  constexpr int64_t kGroupBytes =
      info(format).group_scales * info(format).scale_bytes;  // all scales of a group
  const char* group = scales + (k >> group_log2) * kGroupBytes;
  // The index of the block of value k in its super-block.
  const int block = static_cast<int>(k % kSuperBlock / 32);
  if constexpr (format == WeightFormat::q4_0) {
    const float d = half_at(group);
    return {d, -8 * d};  // unpack_words makes the signed values 8 larger
  } else if constexpr (format == WeightFormat::q4_1) {
    return {half_at(group), half_at(group + 2)};
  } else if constexpr (format == WeightFormat::q4_z) {
    const float d = half_at(group);
    return {d, -d * half_at(group + 2)};
  } else if constexpr (format == WeightFormat::q4_k || format == WeightFormat::q5_k) {
    int scale, minimum;
    packed_scales(group + 4, block, &scale, &minimum);
    return {half_at(group) * static_cast<float>(scale),
            -half_at(group + 2) * static_cast<float>(minimum)};
  } else if constexpr (format == WeightFormat::q6_k) {
    const int scale = static_cast<int8_t>(group[k % kSuperBlock / 16]);
    const float factor = half_at(group + 16) * static_cast<float>(scale);
    return {factor, -32 * factor};
  } else if constexpr (format == WeightFormat::iq4_nl) {
    return {half_at(group), 0.0f};
  } else {
    static_assert(format == WeightFormat::iq4_xs, "");
    const int low = byte_at(group + 4 + block / 2) >> 4 * (block % 2) & 15;
    const int high = byte_at(group + 2 + block / 4) >> 2 * (block % 4) & 3;
    return {half_at(group) * static_cast<float>((low | high << 4) - 32), 0.0f};
  }
}

// For q5_k and q6_k: loads, for each word of a vector, the further word that holds the high bits of
// its values (csrc/formats.h). In q5_k 4 words share a further word, in q6_k 2. The bits of each
// are at another place in it. A shift moves them to the place of those of word 0, so that all lanes
// can be unpacked alike. `words` points to the words of the super-block, and the further words
// follow these. `first` is the index in the super-block of the first word of the vector.
template <WeightFormat format>
MISTRAL_SIMD Words further_bits(const char* words, int64_t first) {
  uint32_t further[Vec::width];
  const char* all = words + kSuperBlock / 2;
  for (int lane = 0; lane < Vec::width; ++lane) {
    const int64_t block = (first + lane) / 4;
    const int word = static_cast<int>((first + lane) % 4);
    const bool five = format == WeightFormat::q5_k;
    memcpy(&further[lane], all + 4 * (five ? block : 8 * (word / 2) + block), 4);
    further[lane] >>= five ? fifth_bit_shift(word, 0) : high_bits_shift(word, 0);
  }
  return load_words(further);
}

#if defined(__AVX512F__)

// Lane i of the result is lane index[i] of x.
MISTRAL_SIMD __m512 lanes_at(__m512i index, __m512 x) { return _mm512_permutexvar_ps(index, x); }
// Lane i of the result is lane_of(i).
template <class LaneOf>
MISTRAL_SIMD __m512i lanes_of(const LaneOf& lane_of) {
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = lane_of(i);
  return _mm512_load_si512(lanes);
}

MISTRAL_SIMD __m512 half_in_all_lanes(const char* p) {
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(bits)));
}
MISTRAL_SIMD __m512 widen_signed(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// Unpacks the scales and minima of 6 bits of a super-block (packed_scales) to bytes: first the 8
// scales, then the 8 minima. Each 128-bit lane of `groups` has the 16 bytes of scales of one row.
MISTRAL_SIMD __m512i six_bit_bytes(__m512i groups) {
  const auto of_words = [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t words[4] = {a, b, c, d};
    return lanes_of([&](int lane) { return static_cast<int32_t>(words[lane % 4]); });
  };
  // The 16 bytes are words 0 to 3. Word 1 holds the scales of the first four blocks, word 2 their
  // minima. The top bits of these bytes, and word 3, belong to the last four blocks. So the words
  // of `high` come from words 1, 1, 2 and 2 (CCBB, which begins with the last), those of `low` from
  // word 3.
  const __m512i high =
      _mm512_srlv_epi32(_mm512_shuffle_epi32(groups, _MM_PERM_CCBB), of_words(0, 2, 0, 2));
  const __m512i low =
      _mm512_srlv_epi32(_mm512_shuffle_epi32(groups, _MM_PERM_DDDD), of_words(32, 0, 32, 4));
  constexpr uint32_t kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f, kTwo = 0x30303030;
  return _mm512_ternarylogic_epi32(
      high, of_words(kSix, kTwo, kSix, kTwo),
      _mm512_and_si512(low, _mm512_set1_epi32(static_cast<int32_t>(kFour))),
      0xea);  // (a & b) | c
}

// Multiplies the scales and minima of 6 bits of the 8 blocks of a row by the units d and e, the two
// fp16 numbers at `group`. Lane 2 b is the scale of block b. Lane 2 b + 1 is its minimum with the
// sign changed, because minima are subtracted.
MISTRAL_SIMD __m512 six_bit_pairs(const char* group) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
  const __m128i bytes = _mm512_castsi512_si128(six_bit_bytes(_mm512_castsi128_si512(all)));
  const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(bytes, order)));
  // The units alternate in the lanes. That of the minima changes its sign.
  int32_t units;
  memcpy(&units, group, sizeof units);
  const __m256i halves =
      _mm256_xor_si256(_mm256_set1_epi32(units), _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  return _mm512_mul_ps(numbers, _mm512_cvtph_ps(halves));
}

// The scales of 256 values that are stored in 32 words. `factors` has a lane for each word.
template <WeightFormat format>
struct WordScales {
  static constexpr bool kPairs = format == WeightFormat::q4_1 || format == WeightFormat::q4_z;
  static constexpr bool kMinima =
      kPairs || format == WeightFormat::q4_k || format == WeightFormat::q5_k;

  __m512 factors[2];  // words 0 to 15, words 16 to 31
  __m512 halves;      // a lane for each half of a block (16 values): its factor
  __m512 minima;      // a lane for each half of a block: its offset, if kMinima

  // `row_scales` points to the scales of the whole row. `k` is the index of the first of the 256
  // values, a multiple of 256. `there` is the number of these values that the row has.
  MISTRAL_SIMD WordScales(const char* row_scales, int group_log2, int64_t k, int64_t there) {
    constexpr int64_t kGroupBytes = info(format).group_scales * info(format).scale_bytes;
    const char* group = row_scales + (k >> group_log2) * kGroupBytes;
    if constexpr (format == WeightFormat::q4_k || format == WeightFormat::q5_k) {
      const __m512 pairs = six_bit_pairs(group);
      spread(pairs, [](int block) { return 2 * block; });
      minima = lanes_at(lanes_of([](int half) { return half / 2 * 2 + 1; }), pairs);
    } else if constexpr (format == WeightFormat::q6_k) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group));
      halves = _mm512_mul_ps(widen_signed(bytes), half_in_all_lanes(group + 16));
      for (int i = 0; i < 2; ++i) {
        factors[i] = lanes_at(lanes_of([&](int lane) { return 8 * i + lane / 2; }), halves);
      }
    } else if constexpr (format == WeightFormat::iq4_xs) {
      const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(split_scales(group)));
      const __m512 scales = widen_signed(_mm_sub_epi8(bytes, _mm_set1_epi8(32)));
      spread(_mm512_mul_ps(scales, half_in_all_lanes(group)),
             [](int block) { return block % 2 * 4 + block / 2; });
    } else {
      take_groups(group, group_log2, there);
    }
  }

 private:
  // Gives each lane the scale of its block, which is in lane at(block) of `scales`.
  template <class At>
  MISTRAL_SIMD void spread(__m512 scales, const At& at) {
    for (int i = 0; i < 2; ++i) {
      factors[i] = lanes_at(lanes_of([&](int lane) { return at(4 * i + lane / 4); }), scales);
    }
    halves = lanes_at(lanes_of([&](int half) { return at(half / 2); }), scales);
  }

  // Takes the scales of groups of 32, 64 or 128 values. A group has one or two 16-bit numbers.
  MISTRAL_SIMD void take_groups(const char* group, int group_log2, int64_t there) {
    constexpr int kNumbers = kPairs ? 2 : 1;
    const auto count = static_cast<unsigned>((there >> group_log2) * kNumbers);
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), group);
    const __m512 numbers = _mm512_cvtph_ps(raw);
    // For each lane, the index of the first number of the group to which its block belongs.
    const __m128i shift = _mm_cvtsi32_si128(group_log2 - 5);
    const auto first_of = [&](__m512i blocks) {
      return _mm512_slli_epi32(_mm512_srl_epi32(blocks, shift), kNumbers - 1);
    };
    for (int i = 0; i < 2; ++i) {
      factors[i] =
          lanes_at(first_of(lanes_of([&](int lane) { return 4 * i + lane / 4; })), numbers);
    }
    const __m512i of_halves = first_of(lanes_of([](int half) { return half / 2; }));
    halves = lanes_at(of_halves, numbers);
    if (kPairs) {
      minima = lanes_at(_mm512_add_epi32(of_halves, _mm512_set1_epi32(1)), numbers);
      if (format == WeightFormat::q4_z) {
        minima = _mm512_mul_ps(minima, _mm512_sub_ps(_mm512_setzero_ps(), halves));
      }
    }
  }
};

// The factor and the offset of each word, for a vector of words from value k on.
template <WeightFormat format>
MISTRAL_SIMD void scalings(const WeightRows& w, int64_t k, Vec* factor, Vec* offset) {
  const int64_t first = k - k % kSuperBlock;
  const WordScales<format> scales(w.scales, w.group_log2, first,
                                  mistral::min(kSuperBlock, w.inputs - first));
  const bool last = k != first;
  *factor = {last ? scales.factors[1] : scales.factors[0]};
  if (WordScales<format>::kMinima) {
    const __m512i of_words = lanes_of([](int lane) { return lane / 2; });
    *offset = {lanes_at(last ? _mm512_add_epi32(of_words, _mm512_set1_epi32(8)) : of_words,
                        scales.minima)};
  } else {
    constexpr float kTooLarge = format == WeightFormat::q4_0   ? 8.0f
                                : format == WeightFormat::q6_k ? 32.0f
                                                               : 0.0f;
    *offset = *factor * broadcast(-kTooLarge);
  }
}

#else

// The factor and the offset of each word, for a vector of words from value k on.
template <WeightFormat format>
MISTRAL_SIMD void scalings(const WeightRows& w, int64_t k, Vec* factor, Vec* offset) {
  // Neighbouring words share the scaling: in q6_k two words (16 values), else four (32 values).
  constexpr int kAlike = mistral::min(Vec::width, format == WeightFormat::q6_k ? 2 : 4);
  float factors[Vec::width], offsets[Vec::width];
  for (int lane = 0; lane < Vec::width; lane += kAlike) {
    const int64_t at = mistral::min(k + 8 * lane, w.inputs - 1);
    const Scaling scaling = scaling_at<format>(w.scales, w.group_log2, at);
    for (int i = 0; i < kAlike; ++i) {
      factors[lane + i] = scaling.factor;
      offsets[lane + i] = scaling.offset;
    }
  }
  *factor = load(factors);
  *offset = load(offsets);
}

#endif

// Unpacks 8 vectors of values of the first row, from value k on. Vector i has value i of each word,
// which is the order of Int4Chunk::k_at. Words past the end of the row are 0. Calls put(i, values)
// for each vector.
template <WeightFormat format, class Put>
MISTRAL_SIMD void unpack_words(const WeightRows& w, int64_t k, const Put& put) {
  constexpr int64_t kValues = 8 * Vec::width;
  constexpr int kBits = static_cast<int>(info(format).bits);
  constexpr int kSuperBlockBytes = kSuperBlock / 8 * kBits;
  const char* super_block = w.values + k / kSuperBlock * kSuperBlockBytes;
  const char* values = super_block + k % kSuperBlock / 2;
  char rest[kValues / 2] = {};
  if (k + kValues > w.inputs) {
    memcpy(rest, values, (w.inputs - k) / 2);
    values = rest;
  }

  Vec factor, offset;
  scalings<format>(w, k, &factor, &offset);
  Words words = load_words(values), further{};
  if (kBits > 4) further = further_bits<format>(super_block, k % kSuperBlock / 8);
  for (int i = 0; i < 8; ++i) {
    constexpr bool kTable = format == WeightFormat::iq4_nl || format == WeightFormat::iq4_xs;
    const int shift = int4_shift(i);
    Words value = field(words, shift, 15);
    if (format == WeightFormat::q4_0) value = flip_bit(value, 3);
    if (kBits == 5) value = join(value, field(further, fifth_bit_shift(0, shift), 1), 4);
    if (kBits == 6) value = join(value, field(further, high_bits_shift(0, shift), 3), 4);
    const Vec q = kTable ? look_up(value) : to_vec(value);
    put(i, fma(q, factor, offset));
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

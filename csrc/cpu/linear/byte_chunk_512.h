// The chunk of byte_chunk.h for AVX-512 with VNNI. It multiplies 256 values of four rows at a time,
// in vectors that mix the rows (mixed_rows.h). Each 128-bit lane of a vector belongs to a block of
// 32 values. In the sums, each of the lane's four places of 32 bits belongs to a row. So one
// conversion to floats and one scaling serve 4 rows x 4 blocks, 512 values.
#pragma once

#include "byte_scales_512.h"
#include "mixed_rows.h"

namespace mistral::cpu::MISTRAL_ISA {

// The code that the chunks of four rows and of one row share.
template <WeightFormat format>
struct ByteVectors : ByteFormat<format> {
  using Format = ByteFormat<format>;
  using Format::kBits, Format::kSigned, Format::kTable, Format::kScalesOfHalves;
  // Values are unpacked to unsigned bytes. If kOffsetLog2 is not 0, the bytes are 2^kOffsetLog2
  // larger than the values.
  static constexpr int kOffsetLog2 = kTable ? 7 : kSigned ? 3 : kBits == 6 ? 5 : 0;

  // Unpacks the values in the low (half = 0) or the high halves of the bytes of words. In q5_k and
  // q6_k, words hold only 4 bits of a value, and further words hold the rest (csrc/formats.h).
  // `further` has the further word of each word in the same lane. word_of(lane) is the index of the
  // word of a lane in its block.
  template <class WordOf>
  MISTRAL_SIMD static Bytes unpacked(__m512i words, __m512i further, int half,
                                     const WordOf& word_of) {
    const __m512i fifteen = _mm512_set1_epi8(15);
    const __m512i shifted = half == 0 ? words : _mm512_srli_epi16(words, 4);
    if (kSigned) {
      // Turns two's complement into unsigned values that are 8 larger: (a ^ b) & c.
      return {_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(8), fifteen, 0x28)};
    }
    const __m512i value = _mm512_and_si512(shifted, fifteen);
    if (kTable) return {look_up(value)};
    if (kBits == 4) return {value};
    const auto shift = [&](int lane) {
      const int bit = kBits == 5 ? fifth_bit_shift(word_of(lane), 4 * half)
                                 : high_bits_shift(word_of(lane), 4 * half);
      return (4 - bit + 32) % 32;
    };
    const __m512i moved = _mm512_rolv_epi32(further, lanes_of(shift));
    const __m512i mask = _mm512_set1_epi8(kBits == 5 ? 0x10 : 0x30);
    return {_mm512_ternarylogic_epi32(moved, mask, value, 0xea)};  // (a & b) | c
  }
  // Unpacks words in the order of memory. There the word of a lane has the index lane % 4.
  MISTRAL_SIMD static Bytes unpacked(__m512i words, __m512i further, int half) {
    return unpacked(words, further, half, [](int lane) { return lane % 4; });
  }

  // Returns the sums, multiplied by the scales of the weights and by the units of the activations.
  // With minima, adds the minima times the sums of the activations.
  MISTRAL_SIMD static __m512 scaled(Ints sums, __m512 factor, __m512 unit, __m512 minimum,
                                    __m512 activations) {
    const __m512 scale = _mm512_mul_ps(factor, unit);
    if (Format::kMinima) {
      return _mm512_fmadd_ps(to_vec(sums).v, scale, _mm512_mul_ps(minimum, activations));
    }
    __m512 product = _mm512_mul_ps(to_vec(sums).v, scale);
    // This keeps GCC from fusing the product with the next addition, which would round differently.
    asm("" : "+v"(product));
    return product;
  }

 private:
  MISTRAL_SIMD static __m512i look_up(__m512i values) {
    constexpr int kOffset = 1 << kOffsetLog2;
    alignas(16) uint8_t table[16];
    for (int i = 0; i < 16; ++i) table[i] = static_cast<uint8_t>(kTable4[i] + kOffset);
    const __m128i loaded = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(loaded), values);
  }
};

template <WeightFormat format>
struct ByteRow;

template <WeightFormat format>
struct ByteChunk : ByteVectors<format> {
  using Vectors = ByteVectors<format>;
  using Vectors::kBits, Vectors::kOffsetLog2, Vectors::kScalesOfHalves;
  using OneRow = ByteRow<format>;
  static constexpr int kRows = 4;

  // [blocks 0 to 3 or 4 to 7][mixed vector][low or high halves of the bytes]
  Bytes values[2][4][2];
  ByteScales<format> scales;

  // Unpacks the words of four rows from value `k` on. `there` is the number of values from there to
  // the end of a row, at most 256. `row_scales` points to the scales of the whole rows.
  MISTRAL_SIMD void take(const char* const (&words)[kRows], const char* const (&row_scales)[kRows],
                         int group_log2, int64_t k, int64_t there) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i rows[kRows], mixed[kRows], further[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = _mm512_loadu_si512(words[r] + 64 * i);
      mix_rows(rows, mixed);
      mix_further(words, i, further);
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        for (int half = 0; half < 2; ++half) {
          values[i][j][half] = Vectors::unpacked(mixed[j], further[j], half);
        }
      }
    }
    scales.take(row_scales, group_log2, k, there);
  }

  // Adds the products with the activations of N tokens to `totals`.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], ByteSums (&totals)[N]) const {
    const ByteActivations* x[N];
    for (int n = 0; n < N; ++n) x[n] = reinterpret_cast<const ByteActivations*>(lines[n]);
    __m512 sums[N][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i blocks[N];  // a 128-bit lane for each block
      Ints first[N], second[N];
      for (int n = 0; n < N; ++n) {
        blocks[n] = _mm512_loadu_si512(x[n]->blocks[i]);
        first[n] = second[n] = minus_offsets(blocks[n]);
      }
      // `first` gets the products of mixed vectors 0 and 1, `second` those of 2 and 3. So each gets
      // one half of a block, which may have its own scale. In `first` this is the first half (words
      // 0 and 1) of rows 0 and 1, and the last half (words 2 and 3) of rows 2 and 3.
      const auto multiply = [&](Ints(&sums)[N], int j) {
        for (int n = 0; n < N; ++n) {
          for (int half = 0; half < 2; ++half) {
            sums[n] = add_products(sums[n], values[i][j][half], load_bytes(x[n]->values[i][half]));
          }
        }
      };
      multiply(first, 1);
      multiply(second, 3);
      for (int n = 0; n < N; ++n) {
        first[n] = swap_neighbours(first[n]);
        second[n] = swap_neighbours(second[n]);
      }
      multiply(first, 0);
      multiply(second, 2);
      for (int n = 0; n < N; ++n) {
        sums[n][i] = scaled_sums(first[n], swap_pairs(second[n]), blocks[n], i);
      }
    }
    for (int n = 0; n < N; ++n) {
      totals[n] = _mm512_add_ps(totals[n], _mm512_add_ps(sums[n][0], sums[n][1]));
    }
  }

 private:
  // Scales the sums of one half of each block, `first`, and of the other half, `second`, and adds
  // them. `blocks` holds the numbers of ByteActivations::Block, with a 128-bit lane for each block.
  MISTRAL_SIMD __m512 scaled_sums(Ints first, Ints second, __m512i blocks, int i) const {
    const __m512 unit = _mm512_castsi512_ps(_mm512_shuffle_epi32(blocks, _MM_PERM_AAAA));
    const __m512 activations = _mm512_castsi512_ps(_mm512_shuffle_epi32(blocks, _MM_PERM_BBBB));
    const auto scaled = [&](Ints sums, __m512 factor) {
      return Vectors::scaled(sums, factor, unit, scales.minima[i], activations);
    };
    if (!kScalesOfHalves) return scaled(first + second, scales.factors[i]);
    return _mm512_add_ps(scaled(first, scales.factors[i]), scaled(second, scales.other_factors[i]));
  }

  // Returns what the sums start with, to make up for the offset of the unpacked values: minus the
  // offset, times the sum of the activations by which they are multiplied.
  MISTRAL_SIMD static Ints minus_offsets(__m512i blocks) {
    if (kOffsetLog2 == 0) return broadcast_int(0);
    // In every row, words 0 and 1 of a block are at places 0 and 1 of a lane. They meet the first
    // 16 activations of the block, so these places get minus_sums[0]. Places 2 and 3 get
    // minus_sums[1], which is for the last 16.
    return Ints{_mm512_shuffle_epi32(blocks, _MM_PERM_DDCC)} << kOffsetLog2;
  }

  // Finds the further word of each word of the mixed vectors, and puts it at this word's place.
  MISTRAL_SIMD static void mix_further(const char* const (&words)[kRows], int i,
                                       __m512i (&mixed)[kRows]) {
    const char* all[kRows];  // the further words of the super-block of each row
    for (int r = 0; r < kRows; ++r) all[r] = words[r] + kSuperBlock / 2;
    if (kBits == 5) {
      const auto both = [&](int r) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(load_32(all[r])), load_32(all[r + 1]), 1);
      };
      const __m512i first = both(0), last = both(2);
      for (int j = 0; j < kRows; ++j) {
        const auto at = [&](int lane) { return (lane % 4 ^ j) * 8 + 4 * i + lane / 4; };
        mixed[j] = _mm512_permutex2var_epi32(first, lanes_of(at), last);
      }
    } else if (kBits == 6) {
      __m512i rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = _mm512_loadu_si512(all[r]);
      // The further words of two rows, alternately.
      const auto of_pair = [&](int r, int j) {
        const auto at = [&](int lane) {
          return (lane % 2 ^ j) * 16 + lane % 4 / 2 * 8 + 4 * i + lane / 4;
        };
        return _mm512_permutex2var_epi32(rows[r], lanes_of(at), rows[r + 1]);
      };
      mix_pairs(of_pair(0, 0), of_pair(0, 1), of_pair(2, 0), of_pair(2, 1), mixed);
    } else {
      for (__m512i& none : mixed) none = _mm512_setzero_si512();
    }
  }
};

// The chunk for one row. Before the sums are scaled, `added` brings those of all 8 blocks into one
// vector. In its 128-bit lane i, places 0 and 1 belong to block i, and places 2 and 3 to block 4 +
// i. In q6_k the two places of a block have the sums of its halves, because each half has a scale.
// Otherwise both have the sum of the whole block.
template <WeightFormat format>
struct ByteRow : ByteVectors<format> {
  using Vectors = ByteVectors<format>;
  using Vectors::kBits, Vectors::kOffsetLog2, Vectors::kScalesOfHalves;
  static constexpr int kRows = 1;
  static void store_sums(const ByteSums (&sums)[8], float, float* out) {
    store_sums_of_one(sums, out);
  }

  Bytes values[2][2];
  __m512 factors;
  __m512 minima;

  MISTRAL_SIMD void take(const char* const (&words)[1], const char* const (&row_scales)[1],
                         int group_log2, int64_t k, int64_t there) {
    for (int i = 0; i < 2; ++i) {
      const __m512i loaded = _mm512_loadu_si512(words[0] + 64 * i);
      const __m512i further = further_words(words[0] + kSuperBlock / 2, i);
      for (int half = 0; half < 2; ++half) {
        values[i][half] = Vectors::unpacked(loaded, further, half);
      }
    }
    take_scales(row_scales[0], group_log2, k, there);
  }

  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], ByteSums (&totals)[N]) const {
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const ByteActivations*>(lines[n]);
      __m512 blocks[2];  // a 128-bit lane for each block
      Ints sums[2];
      for (int i = 0; i < 2; ++i) {
        const __m512i of_blocks = _mm512_loadu_si512(x->blocks[i]);
        blocks[i] = _mm512_castsi512_ps(of_blocks);
        sums[i] = broadcast_int(0);
        if (kOffsetLog2 != 0) {
          // `sums` start with a number for each half block: minus the offset of the values, times
          // the sum of the activations. `added` adds up all places of a block (in q6_k, of a half
          // block), so the mask keeps each number at only one of them. The mask is a vector,
          // because a mask register would be loaded again in each iteration.
          const auto mask = [](int lane) {
            return kScalesOfHalves ? -(lane % 2 == 0) : -(lane % 4 >= 2);
          };
          const __m512i placed =
              kScalesOfHalves ? _mm512_shuffle_epi32(of_blocks, _MM_PERM_DDCC) : of_blocks;
          sums[i] = Ints{_mm512_and_si512(placed, lanes_of(mask))} << kOffsetLog2;
        }
        for (int half = 0; half < 2; ++half) {
          sums[i] = add_products(sums[i], values[i][half], load_bytes(x->values[i][half]));
        }
      }
      const __m512 unit = _mm512_shuffle_ps(blocks[0], blocks[1], 0);
      const __m512 activations = _mm512_shuffle_ps(blocks[0], blocks[1], 0b01010101);
      __m512 sum = Vectors::scaled(added(sums), factors, unit, minima, activations);
      if (kScalesOfHalves) sum = _mm512_add_ps(sum, _mm512_shuffle_ps(sum, sum, 0b10110001));
      sum = _mm512_add_ps(sum, _mm512_shuffle_ps(sum, sum, 0b01001110));
      totals[n] = _mm512_add_ps(totals[n], sum);
    }
  }

 private:
  static constexpr int kEven = 0b10001000, kOdd = 0b11011101;  // for _mm512_shuffle_ps

  MISTRAL_SIMD void take_scales(const char* row_scales, int group_log2, int64_t k, int64_t there) {
    const auto block_of = [](int lane) { return lane % 4 / 2 * 4 + lane / 4; };
    if constexpr (Vectors::kSixBitScales) {
      constexpr int64_t kGroupBytes = info(format).scale_bytes * info(format).group_scales;
      const __m512 pairs = six_bit_pairs(row_scales + (k >> group_log2) * kGroupBytes);
      factors = lanes_at(lanes_of([&](int lane) { return 2 * block_of(lane); }), pairs);
      minima = lanes_at(lanes_of([&](int lane) { return 2 * block_of(lane) + 1; }), pairs);
      return;
    }
    const WordScales<format> of_words(row_scales, group_log2, k, there);
    factors =
        _mm512_shuffle_ps(of_words.factors[0], of_words.factors[1], kScalesOfHalves ? kEven : 0);
    if (WordScales<format>::kMinima) {
      minima = lanes_at(lanes_of([&](int lane) { return 2 * block_of(lane); }), of_words.minima);
    }
  }

  // Adds up the places of each block, or of each half block, and moves the sums to the places that
  // ByteRow describes.
  MISTRAL_SIMD static Ints added(const Ints (&sums)[2]) {
    if (kScalesOfHalves) {
      const __m512 first = _mm512_castsi512_ps(sums[0].v), last = _mm512_castsi512_ps(sums[1].v);
      return Ints{_mm512_castps_si512(_mm512_shuffle_ps(first, last, kEven))} +
             Ints{_mm512_castps_si512(_mm512_shuffle_ps(first, last, kOdd))};
    }
    const Ints pairs = Ints{_mm512_unpacklo_epi64(sums[0].v, sums[1].v)} +
                       Ints{_mm512_unpackhi_epi64(sums[0].v, sums[1].v)};
    return pairs + swap_neighbours(pairs);
  }

  // Finds the further word of each of 16 words, and puts it at this word's place. `all` points to
  // the further words of the super-block.
  MISTRAL_SIMD static __m512i further_words(const char* all, int i) {
    if (kBits == 5) {
      const __m512i words = _mm512_castsi256_si512(load_32(all));
      return _mm512_permutexvar_epi32(lanes_of([&](int lane) { return 4 * i + lane / 4; }), words);
    }
    if (kBits == 6) {
      const auto at = [&](int lane) { return lane % 4 / 2 * 8 + 4 * i + lane / 4; };
      return _mm512_permutexvar_epi32(lanes_of(at), _mm512_loadu_si512(all));
    }
    return _mm512_setzero_si512();
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

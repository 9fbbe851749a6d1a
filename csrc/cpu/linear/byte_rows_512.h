// 256 values of 32 rows as operands of products of bytes, for many tokens on AVX-512 with VNNI.
// Each 32-bit lane of a vector has a row of its own and holds four neighbouring bytes of it. A word
// of activations is broadcast to all lanes. So sums need no swaps, unlike those of mixed_rows.h,
// and one load of weights serves several tokens. Rows must be rearranged for this, which pays with
// many tokens only.
#pragma once

#include "byte_chunk.h"
#include "gemv_chunks.h"

#if defined(__AVX512VNNI__)

namespace mistral::cpu::MISTRAL_ISA {

// For each l, 0 to 3, calls store(l, y). Here y consists of 128-bit lane l of x0, of x1, of x2 and
// of x3.
template <class Store>
MISTRAL_SIMD void transpose_lanes(__m512i x0, __m512i x1, __m512i x2, __m512i x3,
                                  const Store& store) {
  const __m512i even01 = _mm512_shuffle_i32x4(x0, x1, 0x88);
  const __m512i even23 = _mm512_shuffle_i32x4(x2, x3, 0x88);
  const __m512i odd01 = _mm512_shuffle_i32x4(x0, x1, 0xdd);
  const __m512i odd23 = _mm512_shuffle_i32x4(x2, x3, 0xdd);
  store(0, _mm512_shuffle_i32x4(even01, even23, 0x88));
  store(1, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
  store(2, _mm512_shuffle_i32x4(even01, even23, 0xdd));
  store(3, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
}

// x[r] is row r of a matrix of 16 x 16 words. Transposes it: word w of x[r] becomes word r of x[w].
MISTRAL_SIMD void transpose_words(__m512i (&x)[16]) {
  // First, words change places within lanes of 128 bits, in four vectors at a time.
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[r], x[r + 1]);
    const __m512i b = _mm512_unpackhi_epi32(x[r], x[r + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[r + 2], x[r + 3]);
    const __m512i d = _mm512_unpackhi_epi32(x[r + 2], x[r + 3]);
    x[r] = _mm512_unpacklo_epi64(a, c);
    x[r + 1] = _mm512_unpackhi_epi64(a, c);
    x[r + 2] = _mm512_unpacklo_epi64(b, d);
    x[r + 3] = _mm512_unpackhi_epi64(b, d);
  }
  __m512i out[16];
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    transpose_lanes(x[w], x[4 + w], x[8 + w], x[12 + w],
                    [&](int lane, __m512i words) { out[4 * lane + w] = words; });
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = out[i];
}

template <WeightFormat format>
class ByteRows {
 public:
  static constexpr int kRows = 32;
  static constexpr int kTokens = 4;  // the number of tokens that are multiplied at a time
  static constexpr int kGroups = kRows / 16;

  // The sums of a token with kRows rows. Vector [b][g] has, for the 16 rows of group g, the sums of
  // blocks b and b + 4 of all super-blocks. byte_chunk_512.h, for few tokens, adds these together
  // too (in its 128-bit lane b). So a token gets the same bits from both.
  using Totals = __m512[4][kGroups];

  // Unpacks chunk i of the first kRows rows. If `rows` is less than that, the last row stands for
  // the missing rows.
  MISTRAL_SIMD void take(const WeightRows& w, int64_t rows, int64_t i) {
    const int64_t there = mistral::min(kSuperBlock, w.inputs - i * kSuperBlock);
    for (int group = 0; group < kGroups; ++group) {
      const int64_t first = mistral::min(int64_t{16} * group, rows - 1);
      const int64_t last = mistral::min(int64_t{15}, rows - 1 - first);
      const Strided words = {w.values + first * w.row_bytes + i * kBytes, w.row_bytes, last};
      if (there == kSuperBlock) {
        take_values(words, group);
      } else {
        char rest[16][kBytes] = {};
        for (int r = 0; r < 16; ++r) memcpy(rest[r], words.row(r), w.bytes(there));
        take_values({rest[0], kBytes, 15}, group);
      }
      take_scales({w.scales + first * w.scale_bytes, w.scale_bytes, last}, group, w.group_log2,
                  i * kSuperBlock, there);
    }
  }

  // Adds the products with the activations of N tokens to `totals`.
  template <int N>
  MISTRAL_SIMD void add(const char* x, int64_t stride_x, Totals* totals) const {
    const ByteActivations* tokens[N];
    for (int n = 0; n < N; ++n) {
      tokens[n] = reinterpret_cast<const ByteActivations*>(x + n * stride_x);
    }
    for (int lane = 0; lane < 4; ++lane) {
      __m512 of_blocks[2][kGroups][N];
      multiply_block(tokens, 0, lane, of_blocks[0]);
      multiply_block(tokens, 1, lane, of_blocks[1]);
      for (int n = 0; n < N; ++n) {
        for (int g = 0; g < kGroups; ++g) {
          __m512& total = totals[n][lane][g];
          total = _mm512_add_ps(total, _mm512_add_ps(of_blocks[0][g][n], of_blocks[1][g][n]));
        }
      }
    }
  }

  // The results of 16 rows for a token. The sums are added in the order of sums_of_places
  // (mixed_rows.h), which adds them for few tokens. So both give the same bits.
  static Vec sums_of(const Totals& totals, int group) {
    return {_mm512_add_ps(_mm512_add_ps(totals[0][group], totals[2][group]),
                          _mm512_add_ps(totals[1][group], totals[3][group]))};
  }

 private:
  using Vectors = ByteVectors<format>;
  static constexpr int64_t kBytes = Vectors::kBytes;
  // The number of scales of a block.
  static constexpr int kHalves = Vectors::kScalesOfHalves ? 2 : 1;

  // The values of block number 4 i + lane (see multiply_block):
  // [lane][i][word][low or high 4 bits][group].
  __m512i values_[4][2][4][2][kGroups];
  __m512 factors_[8][kHalves][kGroups];
  __m512 minima_[8][kGroups];

  // The values or the scales of 16 rows in memory.
  struct Strided {
    const char* first;
    int64_t stride;
    int64_t last;  // the index of the last row, which also stands for the rows after it

    MISTRAL_SIMD const char* row(int r) const {
      return first + mistral::min(int64_t{r}, last) * stride;
    }
  };

  // For each row and token: multiplies block number 4 i + lane of the weights by that of the
  // activations, sums the products, and scales the sum. The name `lane` comes from the order in
  // memory, where these values fill a 128-bit lane of vector i.
  template <int N>
  MISTRAL_SIMD void multiply_block(const ByteActivations* const (&tokens)[N], int i, int lane,
                                   __m512 (&products)[kGroups][N]) const {
    constexpr int kWords = 4 / kHalves;  // the number of words that share a scale
    const int block = 4 * i + lane;
#pragma GCC unroll 2
    for (int part = 0; part < kHalves; ++part) {
      Ints sums[kGroups][N];
      for (int n = 0; n < N; ++n) {
        const Ints begin = minus_offset(tokens[n]->blocks[i][lane], part);
        for (int g = 0; g < kGroups; ++g) sums[g][n] = begin;
      }
#pragma GCC unroll 4
      for (int word = kWords * part; word < kWords * (part + 1); ++word) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i* weights = values_[lane][i][word][half];
          for (int n = 0; n < N; ++n) {
            int32_t x;
            memcpy(&x, tokens[n]->values[i][half] + (4 * lane + word) * 4, sizeof x);
            const Bytes activations = {_mm512_set1_epi32(x)};
            for (int g = 0; g < kGroups; ++g) {
              sums[g][n] = add_products(sums[g][n], {weights[g]}, activations);
            }
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        const ByteActivations::Block& x = tokens[n]->blocks[i][lane];
        for (int g = 0; g < kGroups; ++g) {
          const __m512 minimum = Vectors::kMinima ? minima_[block][g] : _mm512_setzero_ps();
          const __m512 product =
              Vectors::scaled(sums[g][n], factors_[block][part][g], _mm512_set1_ps(x.scale),
                              minimum, _mm512_set1_ps(x.sum));
          products[g][n] = part == 0 ? product : _mm512_add_ps(products[g][n], product);
        }
      }
    }
  }

  // Unpacked values may be larger than the true values by an offset (kOffsetLog2). To correct this,
  // sums begin with minus the offset times the sum of the activations. These are the activations of
  // the block or, if its halves have scales of their own, of half `part`.
  MISTRAL_SIMD static Ints minus_offset(const ByteActivations::Block& x, int part) {
    if (Vectors::kOffsetLog2 == 0) return broadcast_int(0);
    Ints sum = broadcast_int(x.minus_sums[part]);
    if (kHalves == 1) sum = sum + broadcast_int(x.minus_sums[1]);
    return sum << Vectors::kOffsetLog2;
  }

  MISTRAL_SIMD void take_values(const Strided& words, int group) {
    __m512i further[16];
    if (Vectors::kBits > 4) {
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        const char* from = words.row(r) + kSuperBlock / 2;
        further[r] =
            Vectors::kBits == 5 ? _mm512_castsi256_si512(load_32(from)) : _mm512_loadu_si512(from);
      }
      transpose_words(further);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(words.row(r) + 64 * i);
      transpose_words(x);
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) {
        const int lane = w / 4, word = w % 4, block = 4 * i + lane;
        __m512i bits = x[w];
        if (Vectors::kBits == 5) bits = further[block];
        if (Vectors::kBits == 6) bits = further[word / 2 * 8 + block];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          values_[lane][i][word][half][group] =
              Vectors::unpacked(x[w], bits, half, [&](int) { return word; }).v;
        }
      }
    }
  }

  MISTRAL_SIMD void take_scales(const Strided& scales, int group, int group_log2, int64_t k,
                                int64_t there) {
    ByteScales<format> of_rows[4];
    for (int r = 0; r < 4; ++r) {
      const char* const four[4] = {scales.row(4 * r), scales.row(4 * r + 1), scales.row(4 * r + 2),
                                   scales.row(4 * r + 3)};
      of_rows[r].take(four, group_log2, k, there);
    }
    for (int i = 0; i < 2; ++i) {
      const auto transpose = [&](const auto& scales_of, const auto& store) {
        transpose_lanes(
            _mm512_castps_si512(scales_of(of_rows[0])), _mm512_castps_si512(scales_of(of_rows[1])),
            _mm512_castps_si512(scales_of(of_rows[2])), _mm512_castps_si512(scales_of(of_rows[3])),
            [&](int lane, __m512i x) { store(4 * i + lane, _mm512_castsi512_ps(x)); });
      };
      if (Vectors::kScalesOfHalves) {
        // In `factors`, places 0 and 1 have the scales of first halves, places 2 and 3 those of
        // last halves. In `other_factors` it is the other way round.
        for (int half = 0; half < kHalves; ++half) {
          transpose(
              [&](const auto& rows) {
                const __mmask16 other = half == 0 ? 0xcccc : 0x3333;
                return _mm512_mask_blend_ps(other, rows.factors[i], rows.other_factors[i]);
              },
              [&](int block, __m512 x) { factors_[block][half][group] = x; });
        }
      } else {
        transpose([&](const auto& rows) { return rows.factors[i]; },
                  [&](int block, __m512 x) { factors_[block][0][group] = x; });
      }
      if constexpr (Vectors::kMinima) {
        transpose([&](const auto& rows) { return rows.minima[i]; },
                  [&](int block, __m512 x) { minima_[block][group] = x; });
      }
    }
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

#endif

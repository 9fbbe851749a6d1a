// gemv for q8_0 on AVX-512 with VNNI. The activations of a token become 16-bit integers, in a unit
// that is chosen for the token (unit_of in integers.h). The weights are widened to 16 bits once for
// all tokens. An instruction multiplies 16-bit integers and adds pairs of products. With several
// tokens, 128 values of four rows are multiplied at a time, in vectors that mix the rows
// (mixed_rows.h).
#pragma once

#include "gemv_chunks.h"
#include "mixed_rows.h"
#include "unpack_words.h"

namespace mistral::cpu::MISTRAL_ISA {

// A tag in the place of a chunk type (formats.h). It selects the kernels of this file (Few, below).
struct InPairs {
  struct Arithmetic {
    using Element = char;
  };
};

// Whether these kernels multiply a format. They do so if its values are bytes, with a scale for
// each group.
constexpr bool has_pair_products([[maybe_unused]] WeightFormat format) {
#if defined(__AVX512VNNI__)
  return info(format).bits == 8 && info(format).least_group != 0;
#else
  return false;
#endif
}

#if defined(__AVX512VNNI__)

struct PairRow;

struct PairChunk {
  static constexpr int kRows = 4;
  static constexpr int kTokens = 1;
  using OneRow = PairRow;
  static constexpr int64_t kValues = 128;
  static constexpr int64_t kBytes = kValues;

  // A packed token begins with its unit. A line has, for each 64 values, the values with even
  // indices and then the values with odd indices.
  static constexpr int64_t kHeadBytes = 64;
  static constexpr int64_t kLineBytes = kValues * int64_t{sizeof(int16_t)};
  static float unit(const char* x) {
    float value;
    memcpy(&value, x, sizeof value);
    return value;
  }

  using Sums = __m512;
  static void store_sums(const Sums (&sums)[8], float unit, float* out) {
    store_row_sums(sums, out);
    for (int i = 0; i < 8 * kRows; ++i) out[i] *= unit;
  }

  Shorts values[2][kRows][2];  // [first or last 64 values][mixed vector][even or odd bytes]
  __m512 factors[2];           // a 128-bit lane for each half block, with the scales of the rows

  MISTRAL_SIMD void take(const char* const (&bytes)[kRows], const char* const (&scales)[kRows], int,
                         int64_t k, int64_t there) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m512i rows[kRows], mixed[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = _mm512_loadu_si512(bytes[r] + 64 * i);
      mix_rows(rows, mixed);
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        values[i][j][0] = {_mm512_srai_epi16(_mm512_slli_epi16(mixed[j], 8), 8)};
        values[i][j][1] = {_mm512_srai_epi16(mixed[j], 8)};
      }
    }
    const auto mask = static_cast<__mmask8>((1u << there / 32) - 1);
    const auto both = [&](int r) {
      const int64_t first = k / 32 * kScaleBytes;
      return _mm_unpacklo_epi64(_mm_maskz_loadu_epi16(mask, scales[r] + first),
                                _mm_maskz_loadu_epi16(mask, scales[r + 1] + first));
    };
    const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(both(0)), both(2), 1);
    for (int i = 0; i < 2; ++i) {
      int16_t at[16];  // scales of neighbouring rows are 4 elements apart in `all`
      for (int lane = 0; lane < 16; ++lane) {
        at[lane] = static_cast<int16_t>(lane % 4 * 4 + 2 * i + lane / 8);
      }
      factors[i] = _mm512_cvtph_ps(_mm256_permutexvar_epi16(load_32(at), all));
    }
  }

  // Adds the products with the activations of N tokens to `totals`.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Sums (&totals)[N]) const {
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const int16_t*>(lines[n]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Ints first = broadcast_int(0), second = broadcast_int(0);
        const auto multiply = [&](Ints& sums, int j) {
          for (int odd = 0; odd < 2; ++odd) {
            sums = add_pairs(sums, values[i][j][odd], load_shorts(x + 64 * i + 32 * odd));
          }
        };
        multiply(first, 1);
        multiply(second, 3);
        first = swap_neighbours(first);
        second = swap_neighbours(second);
        multiply(first, 0);
        multiply(second, 2);
        const Vec sums = to_vec(first + swap_pairs(second));
        totals[n] = _mm512_fmadd_ps(sums.v, factors[i], totals[n]);
      }
    }
  }
};

// The chunk for one row. In the sums, the four 32-bit places of a 128-bit lane all hold the same
// sum of this row.
struct PairRow {
  static constexpr int kRows = 1;
  static constexpr int kTokens = 1;
  static constexpr int64_t kValues = PairChunk::kValues;
  static constexpr int64_t kBytes = PairChunk::kBytes;
  static constexpr int64_t kHeadBytes = PairChunk::kHeadBytes;
  static constexpr int64_t kLineBytes = PairChunk::kLineBytes;
  static float unit(const char* x) { return PairChunk::unit(x); }

  using Sums = __m512;
  static void store_sums(const Sums (&sums)[8], float unit, float* out) {
    store_sums_of_one(sums, out);
    for (int i = 0; i < 8; ++i) out[i] *= unit;
  }

  Shorts values[2][2];
  __m512 factors[2];

  MISTRAL_SIMD void take(const char* const (&bytes)[1], const char* const (&scales)[1], int,
                         int64_t k, int64_t there) {
    const auto mask = static_cast<__mmask8>((1u << there / 32) - 1);
    const __m512 all = _mm512_castps128_ps512(
        _mm_cvtph_ps(_mm_maskz_loadu_epi16(mask, scales[0] + k / 32 * kScaleBytes)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i loaded = _mm512_loadu_si512(bytes[0] + 64 * i);
      values[i][0] = {_mm512_srai_epi16(_mm512_slli_epi16(loaded, 8), 8)};
      values[i][1] = {_mm512_srai_epi16(loaded, 8)};
      factors[i] = lanes_at(lanes_of([&](int lane) { return 2 * i + lane / 8; }), all);
    }
  }

  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Sums (&totals)[N]) const {
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const int16_t*>(lines[n]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        Ints sums = broadcast_int(0);
        for (int odd = 0; odd < 2; ++odd) {
          sums = add_pairs(sums, values[i][odd], load_shorts(x + 64 * i + 32 * odd));
        }
        sums = sums + swap_neighbours(sums);
        sums = sums + swap_pairs(sums);
        totals[n] = _mm512_fmadd_ps(to_vec(sums).v, factors[i], totals[n]);
      }
    }
  }
};

template <>
struct Few<InPairs> : FewInChunks<PairChunk> {};

// The number of bytes of the packed K activations of a token.
constexpr int64_t packed_pair_row(int64_t inputs) {
  return PairChunk::kHeadBytes + ceil_div(inputs, PairChunk::kValues) * PairChunk::kLineBytes;
}

// Packs the K activations of a token.
template <class T>
void pack_pairs(const T* x, int64_t inputs, char* out) {
  const Unit unit = unit_of(largest_magnitude(x, inputs));
  memcpy(out, &unit.value, sizeof unit.value);
  auto* line = reinterpret_cast<int16_t*>(out + PairChunk::kHeadBytes);
  for (int64_t begin = 0; begin < inputs; begin += PairChunk::kValues) {
    for (int64_t from = begin; from < begin + PairChunk::kValues; from += 64, line += 64) {
      int16_t natural[64];
      for (int64_t i = 0; i < 64; i += Vec::width) {
        const int64_t there = mistral::max(int64_t{0}, inputs - from - i);
        const Vec values =
            there >= Vec::width ? load(x + from + i) : load_first(x + from + i, there);
        store_rounded(natural + i, values * broadcast(unit.inverse));
      }
      for (int i = 0; i < 64; ++i) line[i % 2 * 32 + i / 2] = natural[i];
    }
  }
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

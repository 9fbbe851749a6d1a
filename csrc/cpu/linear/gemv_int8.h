// gemv for weights of 8 bits, in integers: widening them to floats would take longer than fast
// memory takes to bring them. VNNI multiplies bytes as they are.
//
// The activations of a token become 16-bit integers, in a unit that is chosen for the token
// (unit_of in integers.h). An instruction multiplies unsigned bytes by signed bytes, so an
// activation is split into a signed high byte and an unsigned low byte. Low bytes are multiplied by
// the signed weight, high bytes by the weight as an unsigned byte, which is 128 larger:
//
//   256 (sum of (weight + 128) high - 128 sum of high) + sum of weight low
//
// The second sum is packed with the activations. If a row has one scale, the sums of a whole row
// are integers. They are exact for rows of up to kMaxInt8Inputs values: they may wrap around on the
// way, but the results fit. If each 32 values have a scale, the sums of 64 values become floats.
#pragma once

#include <type_traits>

#include "../simd/integers.h"
#include "gemv.h"

namespace mistral::cpu::MISTRAL_ISA {

// Packed activations of a token: a TokenHead, then for each chunk a line of its high bytes and its
// low bytes. Where blocks have scales, the line begins with -128 times the sums of high bytes.
template <bool has_blocks>
struct InIntegers {
  struct Arithmetic {
    using Element = uint8_t;
  };
  struct Scales;
  static constexpr int64_t kValues = 64;
  static constexpr bool kGrouped = has_blocks;
  static constexpr int64_t kHeadBytes = 128;
  static constexpr int64_t kOffsetBytes = kGrouped ? 64 : 0;
  static constexpr int64_t kLineBytes = kOffsetBytes + 2 * kValues;

  static constexpr int64_t bytes(int64_t values) { return values; }
};

template <bool has_blocks>
constexpr int64_t kPackedBytes<InIntegers<has_blocks>> = has_blocks ? 3 : 2;

// Bytes need no unpacking, and a single stream is read fastest.
template <bool has_blocks>
constexpr bool kPairsRows<InIntegers<has_blocks>> = false;

// Packs the K activations of a token, at an address that is a multiple of 64.
template <class Chunk, class T>
void pack_integers(const T* x, int64_t inputs, uint8_t* out);

// Whether a format has these products: its values are bytes.
constexpr bool has_int8_products([[maybe_unused]] WeightFormat format) {
#if defined(__AVX512VNNI__)
  return info(format).bits == 8;
#else
  return false;
#endif
}

#if defined(__AVX512VNNI__)

struct TokenHead {
  Ints offset;  // in each lane: -128 times the sum of its high bytes, if a row has one scale
  alignas(64) float unit;

  static const TokenHead& of(const uint8_t* x) { return *reinterpret_cast<const TokenHead*>(x); }
};
static_assert(sizeof(TokenHead) == InIntegers<false>::kHeadBytes);

template <int R, int N>
struct Product<InIntegers<false>, R, N> {
  using Chunk = InIntegers<false>;
  // An addition waits for the previous addition to the same sum, so one row and token use two sums.
  static constexpr int kSums = R * N == 1 ? kChains : 1;

  Ints high[kSums][N][R], low[kSums][N][R];

  MISTRAL_SIMD void start(const uint8_t* x, int64_t stride_x) {
    for (int i = 0; i < kSums; ++i) {
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) {
          high[i][n][r] = i == 0 ? TokenHead::of(x + n * stride_x).offset : broadcast_int(0);
          low[i][n][r] = broadcast_int(0);
        }
      }
    }
  }

  MISTRAL_SIMD void add(const WeightRows& w, const uint8_t* x, int64_t stride_x, int64_t begin,
                        int64_t end, const char* next) {
    Product sum = *this;
    for_each_chunk<Chunk, R, N>(
        w, begin, end, next,
        [&](int64_t chunk, int chain, const char* const(&values)[R], const Vec(&)[R]) {
          const int i = chain % kSums;
          const uint8_t* line = x + Chunk::kHeadBytes + chunk * Chunk::kLineBytes;
          Bytes weights[R];
          for (int r = 0; r < R; ++r) weights[r] = load_bytes(values[r]);
          for (int n = 0; n < N; ++n) {
            const Bytes high_bytes = load_bytes(line + n * stride_x);
            const Bytes low_bytes = load_bytes(line + n * stride_x + Chunk::kValues);
            for (int r = 0; r < R; ++r) {
              sum.high[i][n][r] = add_products(sum.high[i][n][r], add_128(weights[r]), high_bytes);
              sum.low[i][n][r] = add_products(sum.low[i][n][r], low_bytes, weights[r]);
            }
          }
        });
    *this = sum;
  }

  MISTRAL_SIMD void finish(const WeightRows& w, const uint8_t* x, int64_t stride_x, float* out,
                           int64_t stride_out) const {
    for (int n = 0; n < N; ++n) {
      const float unit = TokenHead::of(x + n * stride_x).unit;
      for (int r = 0; r < R; ++r) {
        Ints highs = high[0][n][r], lows = low[0][n][r];
        for (int i = 1; i < kSums; ++i) {
          highs = highs + high[i][n][r];
          lows = lows + low[i][n][r];
        }
        const Vec total = fma(to_vec(highs), broadcast(256.0f), to_vec(lows));
        out[n * stride_out + r] = sum(total) * unit * row_scale<Chunk>(w, r);
      }
    }
  }
};

// The scales of neighbouring chunks, two of each.
template <bool has_blocks>
struct InIntegers<has_blocks>::Scales {
  using Loaded = __m512;

  __mmask8 there;

  Scales(int, int64_t values)
      : there(static_cast<__mmask8>((1 << mistral::min(values, kChains * kValues) / 32) - 1)) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_maskz_loadu_epi16(there, scales)));
  }
  // The scale of the values in each lane of chunk i.
  MISTRAL_SIMD Vec of_chunk(Loaded scales, int i) const {
    const __m512i of_lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return {_mm512_permutexvar_ps(_mm512_add_epi32(of_lanes, _mm512_set1_epi32(2 * i)), scales)};
  }
};

template <int R, int N>
struct Product<InIntegers<true>, R, N> {
  using Chunk = InIntegers<true>;

  Vec totals[N][R];

  MISTRAL_SIMD void start(const uint8_t*, int64_t) {
    for (auto& of_token : totals) {
      for (Vec& total : of_token) total = broadcast(0.0f);
    }
  }

  MISTRAL_SIMD void add(const WeightRows& w, const uint8_t* x, int64_t stride_x, int64_t begin,
                        int64_t end, const char* next) {
    Product sum = *this;
    for_each_chunk<Chunk, R, N>(
        w, begin, end, next,
        [&](int64_t chunk, int, const char* const(&values)[R], const Vec(&scales)[R]) {
          const uint8_t* line = x + Chunk::kHeadBytes + chunk * Chunk::kLineBytes;
          Bytes weights[R];
          for (int r = 0; r < R; ++r) weights[r] = load_bytes(values[r]);
          for (int n = 0; n < N; ++n) {
            const uint8_t* bytes = line + n * stride_x;
            const Ints offset = load_ints(reinterpret_cast<const int16_t*>(bytes));
            const Bytes high_bytes = load_bytes(bytes + Chunk::kOffsetBytes);
            const Bytes low_bytes = load_bytes(bytes + Chunk::kOffsetBytes + Chunk::kValues);
            for (int r = 0; r < R; ++r) {
              Vec& total = sum.totals[n][r];
              const Ints high = add_products(offset, add_128(weights[r]), high_bytes);
              const Ints low = add_products(broadcast_int(0), low_bytes, weights[r]);
              total = fma(fma(to_vec(high), broadcast(256.0f), to_vec(low)), scales[r], total);
            }
          }
        });
    *this = sum;
  }

  MISTRAL_SIMD void finish(const WeightRows&, const uint8_t* x, int64_t stride_x, float* out,
                           int64_t stride_out) const {
    for (int n = 0; n < N; ++n) {
      const float unit = TokenHead::of(x + n * stride_x).unit;
      for (int r = 0; r < R; ++r) {
        out[n * stride_out + r] = sum(totals[n][r]) * unit;
      }
    }
  }
};

template <class Chunk, class T>
void pack_integers(const T* x, int64_t inputs, uint8_t* out) {
  const auto values_at = [&](int64_t k) {
    return k + Vec::width <= inputs ? load(x + k)
                                    : load_first(x + k, mistral::max(int64_t{0}, inputs - k));
  };
  const Unit unit = unit_of(largest_magnitude(x, inputs));
  TokenHead head{broadcast_int(0), unit.value};
  const auto minus_128_times = [](Ints sum) { return broadcast_int(0) - (sum << 7); };

  Ints sum = broadcast_int(0);
  constexpr int64_t kValues = Chunk::kValues;
  uint8_t* line = out + Chunk::kHeadBytes;
  for (int64_t begin = 0; begin < padded(inputs); begin += kValues) {
    uint8_t* high = line + Chunk::kOffsetBytes;
    for (int64_t i = 0; i < kValues; i += Vec::width) {
      split_rounded(values_at(begin + i) * broadcast(unit.inverse), high + i, high + kValues + i);
    }
    const Ints of_chunk = add_products(broadcast_int(0), broadcast_byte(1), load_bytes(high));
    if constexpr (Chunk::kGrouped) {
      store_ints(reinterpret_cast<int16_t*>(line), minus_128_times(of_chunk));
    } else {
      sum = sum + of_chunk;
    }
    line += Chunk::kLineBytes;
  }
  head.offset = minus_128_times(sum);
  memcpy(out, &head, sizeof head);
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

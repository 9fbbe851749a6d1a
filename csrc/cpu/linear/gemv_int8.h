// gemv in integers, for weights of 8 bits with a scale for each row. Widening the weights to floats
// would take longer than fast memory takes to bring them. VNNI multiplies bytes without widening
// them.
//
// The activations of a token become 16-bit integers, in a unit that is chosen for the token
// (unit_of in integers.h). An instruction multiplies unsigned bytes by signed bytes, so an
// activation is split into a signed high byte and an unsigned low byte. Low bytes are multiplied by
// the signed weight, high bytes by the weight plus 128, which is an unsigned byte. The product of a
// row is then
//
//   256 (sum of (weight + 128) high - 128 sum of high) + sum of weight low
//
// The sum of the high bytes is packed with the activations. The two sums of products are exact in
// 32-bit integers for rows of up to kMaxInt8Inputs values. They may wrap around on the way, but the
// results fit.
#pragma once

#include <type_traits>

#include "../simd/integers.h"
#include "gemv.h"

namespace mistral::cpu::MISTRAL_ISA {

// Takes the place of a chunk type (formats.h) and so selects this file's kernels (Product, below).
// A packed token has a TokenHead, then a line for each chunk, with its high bytes and its low
// bytes.
struct InIntegers {
  struct Arithmetic {
    using Element = uint8_t;
  };
  static constexpr int64_t kValues = 64;
  static constexpr bool kGrouped = false;
  static constexpr int64_t kHeadBytes = 128;
  static constexpr int64_t kLineBytes = 2 * kValues;

  static constexpr int64_t bytes(int64_t values) { return values; }
};

template <>
inline constexpr int64_t kPackedBytes<InIntegers> = 2;

// Packs the K activations of a token. `out` must be 64-byte aligned, because TokenHead::of reads
// the head in place.
template <class T>
void pack_integers(const T* x, int64_t inputs, uint8_t* out);

// Whether these kernels multiply a format. They do so if its values are bytes, with one scale for
// each row.
constexpr bool has_int8_products([[maybe_unused]] WeightFormat format) {
#if defined(__AVX512VNNI__)
  return info(format).bits == 8 && info(format).least_group == 0;
#else
  return false;
#endif
}

#if defined(__AVX512VNNI__)

struct TokenHead {
  Ints offset;  // -128 * (the sum of the high bytes), divided among the lanes
  alignas(64) float unit;

  static const TokenHead& of(const uint8_t* x) { return *reinterpret_cast<const TokenHead*>(x); }
};
static_assert(sizeof(TokenHead) == InIntegers::kHeadBytes);

template <int R, int N>
struct Product<InIntegers, R, N> {
  using Chunk = InIntegers;
  // One row and token use kChains sums, because an addition waits for the previous addition to the
  // same sum. More rows or tokens have several sums anyway.
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

template <class T>
void pack_integers(const T* x, int64_t inputs, uint8_t* out) {
  const auto values_at = [&](int64_t k) {
    return k + Vec::width <= inputs ? load(x + k)
                                    : load_first(x + k, mistral::max(int64_t{0}, inputs - k));
  };
  const Unit unit = unit_of(largest_magnitude(x, inputs));
  Ints sum = broadcast_int(0);
  uint8_t* line = out + InIntegers::kHeadBytes;
  for (int64_t begin = 0; begin < padded(inputs); begin += InIntegers::kValues) {
    for (int64_t i = 0; i < InIntegers::kValues; i += Vec::width) {
      split_rounded(values_at(begin + i) * broadcast(unit.inverse), line + i,
                    line + InIntegers::kValues + i);
    }
    sum = add_products(sum, broadcast_byte(1), load_bytes(line));
    line += InIntegers::kLineBytes;
  }
  const TokenHead head{broadcast_int(0) - (sum << 7), unit.value};
  memcpy(out, &head, sizeof head);
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

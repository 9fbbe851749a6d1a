// gemv in 16-bit integers, for int8, q8_0 and int4. Widening every weight to a float would take
// longer than reading it from memory. One instruction multiplies 16-bit integers and adds pairs of
// products, which is exact. AVX2 also has an instruction for bytes. But its sums have 16 bits, so
// activations would have to lose bits to fit.
//
// The activations of a token become 16-bit integers, in a unit that is chosen for the token
// (unit_of in integers.h). A packed token has a head, which holds the unit, and a line for each
// chunk. The weights of some formats unpack to unsigned values, which are kBias too large. In these
// formats a line begins with a correction for each lane of the sums.
#pragma once

#include "../simd/integers.h"
#include "gemv.h"

namespace mistral::cpu::MISTRAL_ISA {

// The chunk of a format for products in 16-bit integers. kFastest<A> says whether these are faster
// than A, the arithmetic that would multiply the activations otherwise. This template is for
// formats without such a chunk, so here kFastest is false.
template <WeightFormat format>
struct Int16Chunk {
  template <class A>
  static constexpr bool kFastest = false;
};

// Packs the K activations of a token.
template <class Chunk, class T>
void pack_int16(const T* x, int64_t inputs, int16_t* out);

#if defined(MISTRAL_VECTORS)

struct Int16Arithmetic {
  using Element = int16_t;
};

struct Int16Layout {
  using Arithmetic = Int16Arithmetic;
  static constexpr int64_t kStep = Shorts::width;  // the number of values in an operand
  static constexpr int64_t kHead = 32;             // the number of elements in the head: 64 bytes
  // Products of bf16 pairs are as fast, so only products in fp32 are replaced.
  template <class A>
  static constexpr bool kFastest = std::is_same_v<A, Fp32>;
};

// A chunk of signed bytes, in the order of memory.
template <int64_t values>
struct Int16Bytes : Int16Layout {
  static constexpr int64_t kValues = values;
  static constexpr int64_t kOperands = kValues / kStep;
  static constexpr int64_t kBias = 0;
  static constexpr int64_t kLine = kValues;

  static constexpr int64_t bytes(int64_t count) { return count; }
  static int64_t k_at(int64_t position) { return position; }

  void take(const char* from) { values_ = from; }
  Shorts operand(int64_t i) const { return widen_bytes(values_ + i * kStep); }

 private:
  const char* values_;
};

template <>
struct Int16Chunk<WeightFormat::int8> : Int16Bytes<64> {
  static constexpr bool kGrouped = false;
};

#if defined(__AVX2__) && !defined(__AVX512F__)

// The scales of eight chunks of q8_0, or of one chunk at the end of a row. Four scales are loaded
// and converted to floats together, because loads take the longest in these products.
struct EightScales {
  struct Loaded {
    Vec fours[2];
  };
  bool one;

  EightScales(int, int64_t values) : one(values <= 32) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    const auto* from = reinterpret_cast<const f16*>(scales);
    if (one) return {{broadcast(*from), broadcast(0.0f)}};
    return {{load_four(from), load_four(from + 4)}};
  }
  MISTRAL_SIMD Vec of_chunk(const Loaded& loaded, int i) const {
    return of_four(loaded.fours[i / 4], i % 4);
  }
};
template <>
inline constexpr int kTogether<Int16Chunk<WeightFormat::q8_0>> = 8;
using Q8Scales = EightScales;

#else

using Q8Scales = Q8Chunk<Fp32>::Scales;

#endif

template <>
struct Int16Chunk<WeightFormat::q8_0> : Int16Bytes<32> {
  template <class A>
  static constexpr bool kFastest = true;
  static constexpr bool kGrouped = true;
  using Scales = Q8Scales;
};

// A chunk is a vector of words. Operand i holds values 2 i and 2 i + 1 of every word, 8 too large.
template <>
struct Int16Chunk<WeightFormat::int4> : Int16Layout {
  static constexpr int64_t kValues = 8 * Vec::width;
  static constexpr int64_t kOperands = 4;
  static constexpr int64_t kBias = 8;
  static constexpr int64_t kLine = kStep + kValues;
  static constexpr bool kGrouped = true;
  using Scales = GroupScales;

  static constexpr int64_t bytes(int64_t count) { return count / 2; }
  static int64_t k_at(int64_t position) {
    const int64_t within = position % kValues;
    return position - within + within % kStep / 2 * 8 + within / kStep * 2 + within % 2;
  }

  void take(const char* words) { words_ = flip_int4_signs(load_words(words)); }
  Shorts operand(int64_t i) const { return int4_shorts(words_, static_cast<int>(i)); }

 private:
  Words words_;
};

// Measured: with several tokens one row at a time is faster on AVX2, and two rows on AVX-512.
template <WeightFormat format, int N>
constexpr int kRowsAtATime<Int16Chunk<format>, N> = N == 1 || Vec::width == 8 ? 1 : 2;

template <WeightFormat format, int R, int N>
struct Product<Int16Chunk<format>, R, N> {
  using Chunk = Int16Chunk<format>;
  // The number of totals of a row and token. In formats with groups one suffices, because additions
  // to it are rare, and this leaves registers for other values. But if many chunks go together
  // (kTogether), these additions would wait for each other.
  static constexpr int kTotals = Chunk::kGrouped && kTogether<Chunk> == kChains ? 1 : kChains;

  Vec totals[kTotals][N][R];

  MISTRAL_SIMD void start(const int16_t*, int64_t) {
    for (auto& total : totals) {
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) total[n][r] = broadcast(0.0f);
      }
    }
  }

  MISTRAL_SIMD void add(const WeightRows& w, const int16_t* x, int64_t stride_x, int64_t begin,
                        int64_t end, const char* next) {
    Product sum = *this;
    for_each_chunk<Chunk, R, N>(
        w, begin, end, next,
        [&](int64_t chunk, int chain, const char* const(&values)[R], const Vec(&scales)[R]) {
          const int16_t* line = x + Chunk::kHead + chunk * Chunk::kLine;
          constexpr int64_t kBiases = Chunk::kLine - Chunk::kValues;
          Chunk chunks[R];
          for (int r = 0; r < R; ++r) chunks[r].take(values[r]);
          Ints sums[N][R];
          for (int n = 0; n < N; ++n) {
            const Ints bias = kBiases ? load_ints(line + n * stride_x) : broadcast_int(0);
            for (int r = 0; r < R; ++r) sums[n][r] = bias;
          }
#pragma GCC unroll 4
          for (int64_t i = 0; i < Chunk::kOperands; ++i) {
            Shorts weights[R];
            for (int r = 0; r < R; ++r) weights[r] = chunks[r].operand(i);
            for (int n = 0; n < N; ++n) {
              const Shorts activations =
                  load_shorts(line + n * stride_x + kBiases + i * Chunk::kStep);
              for (int r = 0; r < R; ++r) {
                sums[n][r] = add_pairs(sums[n][r], weights[r], activations);
              }
            }
          }
          Vec(&total)[N][R] = sum.totals[chain % kTotals];
          for (int n = 0; n < N; ++n) {
            for (int r = 0; r < R; ++r) {
              const Vec product = to_vec(sums[n][r]);
              total[n][r] =
                  Chunk::kGrouped ? fma(product, scales[r], total[n][r]) : total[n][r] + product;
            }
          }
        });
    *this = sum;
  }

  MISTRAL_SIMD void finish(const WeightRows& w, const int16_t* x, int64_t stride_x, float* out,
                           int64_t stride_out) const {
    for (int n = 0; n < N; ++n) {
      float unit;
      memcpy(&unit, x + n * stride_x, sizeof unit);
      for (int r = 0; r < R; ++r) {
        Vec total = totals[0][n][r];
        for (int i = 1; i < kTotals; ++i) total = total + totals[i][n][r];
        out[n * stride_out + r] = sum(total) * unit * row_scale<Chunk>(w, r);
      }
    }
  }
};

template <class Chunk, class T>
void pack_int16(const T* x, int64_t inputs, int16_t* out) {
  const Unit unit = unit_of(largest_magnitude(x, inputs));
  memcpy(out, &unit.value, sizeof unit.value);
  int16_t* line = out + Chunk::kHead;
  constexpr int64_t kBiases = Chunk::kLine - Chunk::kValues;
  for (int64_t begin = 0; begin < padded(inputs); begin += Chunk::kValues) {
    int16_t natural[Chunk::kValues];
    for (int64_t i = 0; i < Chunk::kValues; i += Vec::width) {
      const int64_t there = mistral::max(int64_t{0}, inputs - begin - i);
      const Vec values =
          there >= Vec::width ? load(x + begin + i) : load_first(x + begin + i, there);
      store_rounded(natural + i, values * broadcast(unit.inverse));
    }
    for (int64_t i = 0; i < Chunk::kValues; ++i) line[kBiases + i] = natural[Chunk::k_at(i)];
    if (kBiases) {
      Ints sums = broadcast_int(0);
      for (int64_t i = 0; i < Chunk::kOperands; ++i) {
        sums = add_pairs(sums, broadcast_short(-Chunk::kBias),
                         load_shorts(line + kBiases + i * Chunk::kStep));
      }
      store_ints(line, sums);
    }
    line += Chunk::kLine;
  }
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

// The product of few tokens with rows of a weight. The rows are read from memory once: a group of
// rows is multiplied by all tokens before the next group, while it is in the cache. Meanwhile the
// next weights are prefetched. With one token, weights are prefetched in the order of addresses, in
// which memory is fastest. With several tokens, they are prefetched in the order in which rows, or
// blocks of rows, are multiplied.
//
// The additions behind an output, and their order, do not depend on the number of tokens. So a
// token gets the same bits alone as together with others, up to kGemvTokens tokens.
#pragma once

#include <type_traits>

#include "../processor.h"
#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kCacheLineBytes = 64;
// The distance in bytes from the weights that are multiplied to those that are prefetched. It is
// further than hardware prefetchers reach. Unlike them, this prefetch also crosses the ends of rows
// and pages.
constexpr int64_t kAheadBytes = 8192;

// The most tokens that are multiplied at a time. More tokens take another pass over a group of
// rows, which is then in the cache. Plain weights are large, so memory limits the speed. For them
// one pass over the rows is faster, as long as the registers hold the sums. With quantised weights
// arithmetic limits the speed. It is cheaper with two rows at a time, which leaves registers for
// fewer tokens.
template <class Chunk>
constexpr int kTokensAtATime = 4;
template <class A, class T>
constexpr int kTokensAtATime<PlainChunk<A, T>> = Vec::width == 16 ? 8 : 4;
// The number of rows that are multiplied at a time by N tokens, unless kTakesWholeRows or
// kPairsRows says otherwise. One row at a time is a single stream, which memory delivers fastest.
// This is best with one token and, as measured, with two tokens on AVX-512. Two rows at a time
// share the loads of activations. This is best with more tokens, as long as the registers hold all
// sums: those of two tokens on AVX2, which has 16 registers, and of up to four elsewhere.
template <class Chunk, int N>
constexpr int kRowsAtATime =
    N == 1 || N > 4 || (Vec::width == 16 && N == 2) || (Vec::width == 8 && N > 2) ? 1 : 2;
// The number of rows in a group of rows. (A group of values is another thing: values that share a
// scale, as csrc/formats.h says.)
constexpr int kGroupRows = 8;
// The number of values in a block of k, which is a range of the values of a row. With several
// tokens, all rows of a group are multiplied in one block of k before the next block, unless whole
// rows are taken (kTakesWholeRows). The activations of a block must fit the L1 cache beside the
// stream of weights: a load that misses L1 would wait behind the cache lines that come from memory.
// `value_bytes` is the size of a packed activation.
constexpr int64_t block_values(int tokens, int64_t value_bytes) {
  constexpr int64_t kActivationBytes = 1 << 14;
  int64_t values = 4096;
  while (values * tokens * value_bytes > kActivationBytes) values /= 2;
  return values;
}
// The size of a packed activation in bytes.
template <class Chunk>
constexpr int64_t kPackedBytes = sizeof(typename Chunk::Arithmetic::Element);
// Whether one token is multiplied by two rows at a time if the rows are short. The rows then share
// the loads of activations. This pays in formats with groups of values, in which arithmetic takes
// the longest.
template <class Chunk>
constexpr bool kPairsRows = Chunk::kGrouped;
// The number of independent sums of a row. Neighbouring chunks are added to different sums, because
// an addition waits for the previous addition to the same sum.
constexpr int kChains = 2;
// The number of chunks that are multiplied in an iteration of a loop, a multiple of kChains. These
// chunks share the instructions of the loop and those that load scales.
template <class Chunk>
constexpr int kTogether = kChains;

// Whether one whole row after another is multiplied by all tokens, if the activations of the tokens
// fit the L1 cache. Then memory is read as a single stream, which is faster than rows in blocks.
// This pays for weights that take longer to come from memory than to multiply.
template <class Chunk>
constexpr bool kTakesWholeRows = false;
#if defined(__AVX512BF16__)
template <>
inline constexpr bool kTakesWholeRows<PlainChunk<Bf16, bf16>> = true;
#endif
// The distance of the prefetch in multiply_whole_rows, in bytes. The distance is not a multiple of
// 4096, so weights that are multiplied and weights that arrive lie in different sets of L1.
constexpr int64_t kRowAheadBytes = 6144;
// Whether the packed activations of `tokens` tokens leave a third of the L1 cache for weights.
template <class Chunk>
bool fit_l1(int64_t tokens, int64_t inputs) {
  return 3 * tokens * padded(inputs) * kPackedBytes<Chunk> <= 2 * kL1Bytes;
}

// Prefetches `bytes` bytes. Locality 3 is into L1 and all other caches, 2 into all caches but L1, 0
// into L1 alone.
template <int locality>
MISTRAL_SIMD void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLineBytes) __builtin_prefetch(from + i, 0, locality);
}

// Prefetches weights into the cache from which this processor reads them fastest (processor.h).
MISTRAL_SIMD void fetch_weights(const char* from, int64_t bytes) {
  if (kFetchesIntoL2) {
    fetch<2>(from, bytes);
  } else {
    fetch<0>(from, bytes);
  }
}

// A stand-in for Chunk::Scales in formats without groups of values.
struct NoScales {
  struct Loaded {};
  NoScales(int, int64_t) {}
  MISTRAL_SIMD Loaded load(const char*) const { return {}; }
  MISTRAL_SIMD Vec of_chunk(Loaded, int) const { return broadcast(1.0f); }
};
template <class Chunk, bool kGrouped = Chunk::kGrouped>
struct ScalesOf {
  using type = NoScales;
};
template <class Chunk>
struct ScalesOf<Chunk, true> {
  using type = typename Chunk::Scales;
};

// Calls f(chunk, chain, values, scales) for the chunks of R rows from k = `begin` to `end`. `chunk`
// is the index of a chunk in its row. Its products go to sum number `chain`, which is below
// kChains. values[r] points to the chunk of row r. scales[r] are its factors if the format has
// groups, and are not set otherwise. `end` must be K or a multiple of kTogether chunks.
//
// Prefetches about as many bytes as it reads, from `next` on. With one token (N = 1) these bytes
// are consecutive. With more tokens they are a range of each of R rows.
template <class Chunk, int R, int N, class F>
MISTRAL_SIMD void for_each_chunk(const WeightRows& w, int64_t begin, int64_t end, const char* next,
                                 const F& f) {
  constexpr int64_t kValues = Chunk::kValues, kBytes = Chunk::bytes(kValues);
  using Scales = typename ScalesOf<Chunk>::type;
  typename Scales::Loaded loaded[R];
  const auto load_scales = [&](const Scales& scales, int64_t chunk) {
    const int64_t first = (chunk * kValues >> w.group_log2) * kScaleBytes;
    for (int r = 0; r < R && Chunk::kGrouped; ++r) {
      loaded[r] = scales.load(w.scales + r * w.scale_bytes + first);
    }
  };
  const auto visit = [&](const Scales& of_chunks, int64_t chunk, int i, auto values_of) {
    const char* values[R];
    Vec scales[R];
    for (int r = 0; r < R; ++r) {
      values[r] = values_of(r);
      if (Chunk::kGrouped) scales[r] = of_chunks.of_chunk(loaded[r], i);
    }
    f(chunk, i % kChains, values, scales);
  };

  // The loop counts chunks, so that the compiler can advance every address by a constant.
  int64_t chunk = begin / kValues;
  next -= chunk * kBytes;
  constexpr int kStride = kTogether<Chunk>;
  const Scales of_chunks(w.group_log2, kStride * kValues);
  for (const int64_t all = end / kValues; chunk + kStride <= all; chunk += kStride) {
    if (N == 1) {
      fetch_weights(next + R * chunk * kBytes, R * kStride * kBytes);
    } else {
      for (int r = 0; r < R; ++r) {
        fetch_weights(next + r * w.row_bytes + chunk * kBytes, kStride * kBytes);
      }
    }
    load_scales(of_chunks, chunk);
#pragma GCC unroll 16
    for (int i = 0; i < kStride; ++i) {
      const int64_t offset = (chunk + i) * kBytes;
      visit(of_chunks, chunk + i, i, [&](int r) { return w.values + r * w.row_bytes + offset; });
    }
  }
  // After the loop some whole chunks may remain, and then a part of a chunk, which is padded with
  // zeros.
  const auto visit_one = [&](int64_t there, auto values_of) {
    const Scales of_rest(w.group_log2, there);
    load_scales(of_rest, chunk);
    visit(of_rest, chunk, 0, values_of);
  };
  const auto from = [&](int r) { return w.values + r * w.row_bytes + chunk * kBytes; };
  for (; (chunk + 1) * kValues <= end; ++chunk) visit_one(kValues, from);
  if (chunk * kValues < end) {
    const int64_t there = end - chunk * kValues;
    char rest[R][kBytes] = {};
    for (int r = 0; r < R; ++r) memcpy(rest[r], from(r), Chunk::bytes(there));
    visit_one(there, [&](int r) { return rest[r]; });
  }
}

// The scale of a whole row, or 1 if the format has no such scale.
template <class Chunk>
MISTRAL_SIMD float row_scale(const WeightRows& w, int row) {
  if (Chunk::kGrouped || !w.scales) return 1.0f;
  return to_float(reinterpret_cast<const bf16*>(w.scales)[row]);
}

// Multiplies the first R rows of `w` by the activations x of N tokens, and sums the products. x is
// packed in the order of Chunk::k_at and padded with zeros. All functions are inlined, so that the
// sums stay in registers. `start` and `finish` take x, because some formats store a scale or an
// offset with the packed activations (gemv_int8.h, gemv_int16.h).
template <class Chunk, int R, int N>
struct Product {
  using A = typename Chunk::Arithmetic;
  // Whether the products of a chunk are summed on their own before they are added to the total. In
  // formats with groups such a sum is scaled. With a single lane, one running sum over thousands of
  // values would lose digits.
  static constexpr bool kSumsChunks = Chunk::kGrouped || Vec::width == 1;
  static constexpr int kTotals = kSumsChunks && Vec::width > 1 ? 1 : kChains;

  Vec totals[kTotals][N][R];

  MISTRAL_SIMD void start(const typename A::Element*, int64_t) {
    for (auto& total : totals) {
      for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) total[n][r] = broadcast(0.0f);
      }
    }
  }

  MISTRAL_SIMD void add(const WeightRows& w, const typename A::Element* x, int64_t stride_x,
                        int64_t begin, int64_t end, const char* next) {
    Product sum = *this;
    for_each_chunk<Chunk, R, N>(
        w, begin, end, next,
        [&](int64_t chunk, int chain, const char* const(&values)[R], const Vec(&scales)[R]) {
          Vec(&total)[N][R] = sum.totals[chain % kTotals];
          Chunk chunks[R];
          for (int r = 0; r < R; ++r) chunks[r].take(values[r]);
          Vec sums[N][R];
          for (int n = 0; n < N; ++n) {
            for (int r = 0; r < R; ++r) sums[n][r] = kSumsChunks ? broadcast(0.0f) : total[n][r];
          }
#pragma GCC unroll 8
          for (int64_t i = 0; i < Chunk::kVectors; ++i) {
            typename A::Operand weights[R];
            for (int r = 0; r < R; ++r) weights[r] = chunks[r].operand(i);
            for (int n = 0; n < N; ++n) {
              const auto activations =
                  A::load(x + n * stride_x + chunk * Chunk::kValues + i * kStep<A>);
              for (int r = 0; r < R; ++r) {
                sums[n][r] = A::multiply_add(weights[r], activations, sums[n][r]);
              }
            }
          }
          for (int n = 0; n < N; ++n) {
            for (int r = 0; r < R; ++r) {
              const Vec factor = Chunk::kGrouped ? scales[r] : broadcast(1.0f);
              total[n][r] = kSumsChunks ? fma(sums[n][r], factor, total[n][r]) : sums[n][r];
            }
          }
        });
    *this = sum;
  }

  MISTRAL_SIMD void finish(const WeightRows& w, const typename A::Element*, int64_t, float* out,
                           int64_t stride_out) const {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) {
        Vec total = totals[0][n][r];
        for (int i = 1; i < kTotals; ++i) total = total + totals[i][n][r];
        out[n * stride_out + r] = sum(total) * row_scale<Chunk>(w, r);
      }
    }
  }
};

// Prefetches the scales of `rows` rows, from row 2 * `rows` of `w` on. If every call has `rows`
// rows, these are the rows of the call after the next.
template <class Chunk>
void fetch_next_scales(const WeightRows& w, int64_t rows) {
  if (!Chunk::kGrouped) return;
  const int64_t bytes = rows * w.scale_bytes;
  fetch<3>(w.scales + 2 * bytes, bytes);
}

// out[r] = the product of row r and one token, for R rows.
template <class Chunk, int R>
void multiply_one(const WeightRows& w, const typename Chunk::Arithmetic::Element* x, float* out) {
  fetch_next_scales<Chunk>(w, R);
  Product<Chunk, R, 1> product;
  product.start(x, 0);
  product.add(w, x, 0, 0, w.inputs, w.values + kAheadBytes);
  product.finish(w, x, 0, out, 0);
}

// out[n * stride_out + r] = the product of row r and token n, for `count` rows and N tokens.
template <class Chunk, int N>
void multiply_whole_rows(const WeightRows& w, int64_t count,
                         const typename Chunk::Arithmetic::Element* x, int64_t stride_x, float* out,
                         int64_t stride_out) {
  for (int64_t row = 0; row < count; ++row) {
    const WeightRows one = w.from(row);
    Product<Chunk, 1, N> product;
    product.start(x, stride_x);
    product.add(one, x, stride_x, 0, w.inputs, one.values + kRowAheadBytes);
    product.finish(one, x, stride_x, out + row, stride_out);
  }
}

// out[n * stride_out + r] = the product of row r and token n, for at most kGroupRows rows and N
// tokens.
template <class Chunk, int N>
void multiply_group(const WeightRows& w, int64_t count,
                    const typename Chunk::Arithmetic::Element* x, int64_t stride_x, float* out,
                    int64_t stride_out) {
  constexpr int R = kRowsAtATime<Chunk, N>;
  if constexpr (N == 1) {
    // Two rows are multiplied together only if they are so short that the prefetch has brought both
    // into the cache.
    int64_t row = 0;
    if (kPairsRows<Chunk> && 2 * w.row_bytes <= kAheadBytes) {
      for (; row + 2 <= count; row += 2) multiply_one<Chunk, 2>(w.from(row), x, out + row);
    }
    for (; row < count; ++row) multiply_one<Chunk, 1>(w.from(row), x, out + row);
  } else {
    if (kTakesWholeRows<Chunk> && fit_l1<Chunk>(N, w.inputs)) {
      return multiply_whole_rows<Chunk, N>(w, count, x, stride_x, out, stride_out);
    }
    fetch_next_scales<Chunk>(w, count);
    Product<Chunk, R, N> products[kGroupRows / R];
    Product<Chunk, 1, N> last;
    for (auto& product : products) product.start(x, stride_x);
    last.start(x, stride_x);
    constexpr int64_t kValues = block_values(N, kPackedBytes<Chunk>);
    constexpr int64_t kAheadRows =
        mistral::min(int64_t{kGroupRows}, R * ceil_div(kAheadBytes, R * Chunk::bytes(kValues)));
    for (int64_t k = 0; k < w.inputs; k += kValues) {
      const int64_t end = mistral::min(k + kValues, w.inputs);
      // The address of the values that are multiplied kAheadRows rows later. They are the same
      // block of a later row. Past the last row they are the next block of the first rows, and past
      // the last block they are in the next group.
      const auto next_of = [&](int64_t row) {
        const int64_t ahead = row + kAheadRows;
        if (ahead < count) return w.from(ahead).values + Chunk::bytes(k);
        if (end < w.inputs) return w.from(ahead - count).values + Chunk::bytes(end);
        return w.from(ahead).values;
      };
      int64_t row = 0;
      for (; row + R <= count; row += R) {
        products[row / R].add(w.from(row), x, stride_x, k, end, next_of(row));
      }
      if (row < count) last.add(w.from(row), x, stride_x, k, end, next_of(row));
    }
    int64_t row = 0;
    for (; row + R <= count; row += R) {
      products[row / R].finish(w.from(row), x, stride_x, out + row, stride_out);
    }
    if (row < count) last.finish(w.from(row), x, stride_x, out + row, stride_out);
  }
}

// Calls f with `tokens`, which must be 1 to kMost, as a constant.
template <int64_t kMost, class F>
void with_tokens(int64_t tokens, const F& f) {
  if constexpr (kMost > 1) {
    if (tokens < kMost) return with_tokens<kMost - 1>(tokens, f);
  }
  f(std::integral_constant<int, int{kMost}>{});
}

// out[t * stride_out + r] = the product of row r and token t, for `count` rows and all tokens.
template <class Chunk>
struct Few {
  static void multiply(const WeightRows& w, int64_t count,
                       const typename Chunk::Arithmetic::Element* x, int64_t stride_x,
                       int64_t tokens, float* out, int64_t stride_out) {
    for (int64_t row = 0; row < count; row += kGroupRows) {
      const WeightRows some = w.from(row);
      const int64_t rows = mistral::min(int64_t{kGroupRows}, count - row);
      constexpr int64_t kMost = kTokensAtATime<Chunk>;
      for (int64_t token = 0; token < tokens; token += kMost) {
        with_tokens<kMost>(mistral::min(kMost, tokens - token), [&](auto some_tokens) {
          multiply_group<Chunk, some_tokens>(some, rows, x + token * stride_x, stride_x,
                                             out + token * stride_out + row, stride_out);
        });
      }
    }
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

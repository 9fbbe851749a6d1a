// The product of a few tokens with rows of a weight: reads the rows once from memory, several at a
// time, for several tokens at a time; further tokens find the rows in the cache. The next rows are
// fetched meanwhile, in the order of addresses, which is what memory is fastest at.
//
// Every output is one vector of partial sums over k in order, whatever the number of tokens: a
// sequence gets the same bits alone and in a batch.
#pragma once

#include "linear_formats.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kCacheLineBytes = 64;
// How far ahead of its use memory is fetched at least: further than the processor's own prefetchers
// dare, and across the ends of rows and pages, where they stop.
constexpr int64_t kAheadBytes = 8192;

// Rows and tokens that are multiplied at a time: of one token one row, a single stream through
// memory; of more, rows that share the activations. Their sums have to stay in registers.
constexpr int rows_at_a_time(int tokens) { return tokens == 1 ? 1 : 2; }
constexpr int kTokensAtATime = Vec::width == 8 ? 2 : 4;
// Neighbouring chunks of a row that are summed side by side, because a sum waits for the one
// before.
constexpr int kChains = 2;

// Whether a chunk's products are summed on their own: int4 scales the sums, and one lane alone
// would lose digits over thousands of values.
template <class Chunk>
constexpr bool kSumsChunks = Chunk::kGrouped || Vec::width == 1;

template <int locality>
MISTRAL_SIMD void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kCacheLineBytes) __builtin_prefetch(from + i, 0, locality);
}

// out[n * stride_out + r]: the products of the first R rows of `w` and N tokens, all of K. x is in
// the order of Chunk::k_at, padded with zeros.
template <class Chunk, int R, int N>
void multiply(const WeightRows& w, const typename Chunk::Arithmetic::Element* x, int64_t stride_x,
              float* out, int64_t stride_out) {
  using A = typename Chunk::Arithmetic;
  constexpr int64_t kChunkBytes = Chunk::bytes(Chunk::kValues);
  Vec totals[kChains][N][R];
  for (auto& chain : totals) {
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) chain[n][r] = broadcast(0.0f);
    }
  }
  const auto accumulate = [&](Vec(&total)[N][R], int64_t k, const GroupScales& groups,
                              auto values_of) {
    Chunk chunks[R];
    for (int r = 0; r < R; ++r) chunks[r].take(values_of(r));
    Vec sums[N][R];
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) sums[n][r] = kSumsChunks<Chunk> ? broadcast(0.0f) : total[n][r];
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < Chunk::kVectors; ++i) {
      typename A::Operand weights[R];
      for (int r = 0; r < R; ++r) weights[r] = chunks[r].operand(i);
      for (int n = 0; n < N; ++n) {
        const auto activations = A::load(x + n * stride_x + k + i * kStep<A>);
        for (int r = 0; r < R; ++r) {
          sums[n][r] = A::multiply_add(weights[r], activations, sums[n][r]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      Vec scales = broadcast(1.0f);
      if (Chunk::kGrouped) {
        scales = groups.load(w.scales + r * w.row_scales + (k >> w.group_log2));
      }
      for (int n = 0; n < N; ++n) {
        total[n][r] = kSumsChunks<Chunk> ? fma(sums[n][r], scales, total[n][r]) : sums[n][r];
      }
    }
  };

  // Rows that are read side by side are fetched in the order of addresses too, so all of them
  // before the first is used: into the L2 cache, because the L1 has no room for as much.
  constexpr int kLocality = R == 1 ? 3 : 2;
  const int64_t ahead = R == 1 ? kAheadBytes : mistral::max(kAheadBytes, R * w.row_bytes);
  if (Chunk::kGrouped) {
    const int64_t bytes = R * w.row_scales * int64_t{sizeof(bf16)};
    fetch<kLocality>(reinterpret_cast<const char*>(w.scales) + 2 * bytes, bytes);
  }
  const GroupScales groups(w.group_log2, Chunk::kValues);
  const auto values_at = [&](int64_t k) {
    return [&w, k](int r) { return w.values + r * w.row_bytes + Chunk::bytes(k); };
  };
  int64_t k = 0;
  for (; k + kChains * Chunk::kValues <= w.inputs; k += kChains * Chunk::kValues) {
    fetch<kLocality>(w.values + R * Chunk::bytes(k) + ahead, R * kChains * kChunkBytes);
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = k + chain * Chunk::kValues;
      accumulate(totals[chain], at, groups, values_at(at));
    }
  }
  for (; k + Chunk::kValues <= w.inputs; k += Chunk::kValues) {
    accumulate(totals[0], k, groups, values_at(k));
  }
  if (k < w.inputs) {
    char rest[R][kChunkBytes] = {};
    for (int r = 0; r < R; ++r) {
      memcpy(rest[r], w.values + r * w.row_bytes + Chunk::bytes(k), Chunk::bytes(w.inputs - k));
    }
    accumulate(totals[0], k, GroupScales(w.group_log2, w.inputs - k),
               [&](int r) { return rest[r]; });
  }

  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) {
      const float factor = w.scales && !Chunk::kGrouped ? to_float(w.scales[r]) : 1.0f;
      out[n * stride_out + r] = sum(totals[0][n][r] + totals[1][n][r]) * factor;
    }
  }
}

template <class Chunk, int N>
void multiply_rows(const WeightRows& w, int64_t count, const typename Chunk::Arithmetic::Element* x,
                   int64_t stride_x, float* out, int64_t stride_out) {
  constexpr int R = rows_at_a_time(N);
  int64_t row = 0;
  for (; row + R <= count; row += R) {
    multiply<Chunk, R, N>(w.from(row), x, stride_x, out + row, stride_out);
  }
  for (; row < count; ++row) {
    multiply<Chunk, 1, N>(w.from(row), x, stride_x, out + row, stride_out);
  }
}

// out[t * stride_out + r]: the products of `count` rows and all tokens.
template <class Chunk>
void multiply_few(const WeightRows& w, int64_t count, const typename Chunk::Arithmetic::Element* x,
                  int64_t stride_x, int64_t tokens, float* out, int64_t stride_out) {
  // Some rows for all tokens before the next ones, so that they are still in the cache.
  constexpr int64_t kRows = 4;
  for (int64_t row = 0; row < count; row += kRows) {
    const WeightRows some = w.from(row);
    const int64_t rows = mistral::min(kRows, count - row);
    for (int64_t token = 0; token < tokens; token += kTokensAtATime) {
      const auto* from = x + token * stride_x;
      float* to = out + token * stride_out + row;
      switch (mistral::min(kTokensAtATime, tokens - token)) {
        case 4: multiply_rows<Chunk, 4>(some, rows, from, stride_x, to, stride_out); break;
        case 3: multiply_rows<Chunk, 3>(some, rows, from, stride_x, to, stride_out); break;
        case 2: multiply_rows<Chunk, 2>(some, rows, from, stride_x, to, stride_out); break;
        default: multiply_rows<Chunk, 1>(some, rows, from, stride_x, to, stride_out);
      }
    }
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

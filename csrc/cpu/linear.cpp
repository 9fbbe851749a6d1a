// A task owns kRowsPerTask rows of the weights and reads them once from memory, four rows at a
// time, for up to four tokens at a time; further tokens find the four rows in the cache.
//
// Every output is one vector of partial sums over k in order, whatever the number of tokens: a
// sequence gets the same bits alone and in a batch.
#include "../linear.h"

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kTokens = 4;
constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kCacheLineBytes = 64;
// How far ahead of its use each of the rows is fetched: further than the processor's own
// prefetchers dare, and across the ends of rows, which they do not know.
constexpr int64_t kAheadBytes = 2048;

// The products of R rows and N tokens, all of K. Rows and tokens past the ends of the matrices are
// not touched: R and N are then smaller.
template <int R, int N, class T>
void multiply(const LinearParams& p, int64_t row, int64_t token) {
  constexpr int64_t kLine = kCacheLineBytes / sizeof(T), kAhead = kAheadBytes / sizeof(T);
  constexpr int64_t kStep = kLine > Vec::width ? kLine : Vec::width;
  const T* weight = static_cast<const T*>(p.weight) + row * p.inputs;
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  Vec partial[N][R];
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) partial[n][r] = broadcast(0.0f);
  }
  const auto accumulate = [&](auto load_at) {
    Vec w[R];
    for (int r = 0; r < R; ++r) w[r] = load_at(weight + r * p.inputs);
    for (int n = 0; n < N; ++n) {
      const Vec v = load_at(x + n * p.stride_x_token);
      for (int r = 0; r < R; ++r) partial[n][r] = fma(v, w[r], partial[n][r]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= p.inputs; k += kStep) {
    // Past the end of these rows, the beginning of the next R.
    const int64_t ahead = k + kAhead < p.inputs ? k + kAhead : k + kAhead + (R - 1) * p.inputs;
    for (int r = 0; r < R; ++r) {
      for (int line = 0; line < kStep; line += kLine) {
        __builtin_prefetch(weight + r * p.inputs + ahead + line);
      }
    }
    for (int i = 0; i < kStep; i += Vec::width) {
      accumulate([&](const T* row) { return load(row + k + i); });
    }
  }
  for (; k + Vec::width <= p.inputs; k += Vec::width) {
    accumulate([&](const T* row) { return load(row + k); });
  }
  if (k < p.inputs) {
    accumulate([&](const T* row) { return load_first(row + k, p.inputs - k); });
  }
  T* out = static_cast<T*>(p.out) + token * p.stride_out_token + row;
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) {
      from_float(sum(partial[n][r]), out + n * p.stride_out_token + r);
    }
  }
}

template <int R, class T>
void multiply_tokens(const LinearParams& p, int64_t row) {
  int64_t token = 0;
  for (; token + kTokens <= p.tokens; token += kTokens) multiply<R, kTokens, T>(p, row, token);
  switch (p.tokens - token) {
    case 3: return multiply<R, 3, T>(p, row, token);
    case 2: return multiply<R, 2, T>(p, row, token);
    case 1: return multiply<R, 1, T>(p, row, token);
  }
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, ceil_div(p.outputs, kRowsPerTask), [&](int64_t task) {
      int64_t row = task * kRowsPerTask;
      const int64_t end = mistral::min(row + kRowsPerTask, p.outputs);
      for (; row + kRows <= end; row += kRows) multiply_tokens<kRows, T>(p, row);
      for (; row < end; ++row) multiply_tokens<1, T>(p, row);
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// The gradient of A or of B (LoraGradientParams in lora.h). A task computes a block of columns of
// the gradient of one adapter. It takes kBlockTokens tokens at a time. Their columns of x stay in
// the cache while all rows of the gradient are computed.
#include "../lora.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kTaskColumns = 256;
// The number of tokens whose products are summed before the sum is added to the result. One running
// sum over thousands of tokens would lose digits.
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kSumRows = 4;  // with 2 vectors: 8 running sums, which fit in registers
constexpr int64_t kSumVectors = 2;

// Adds hidden[row] * x[column], summed over `count` tokens, to a block of `out`: kRows rows from
// `row` on, and kVectors vectors of columns from `column` on. load_at and store_at load and store a
// vector.
template <class T, int64_t kRows, int64_t kVectors, class Load, class Store>
void add_products(const LoraGradientParams& p, const int64_t* tokens, int64_t count, int64_t row,
                  int64_t column, float* out, const Load& load_at, const Store& store_at) {
  Vec sums[kRows][kVectors];
  for (auto& of_row : sums) {
    for (Vec& sum : of_row) sum = broadcast(0.0f);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* x = static_cast<const T*>(p.x) + tokens[i] * p.stride_x_token + column;
    const float* hidden = p.hidden + tokens[i] * p.stride_hidden_token + row;
    Vec values[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) values[v] = load_at(x + v * Vec::width);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = fma(broadcast(hidden[r]), values[v], sums[r][v]);
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      float* to = out + (row + r) * p.columns + column + v * Vec::width;
      store_at(to, load_at(to) + sums[r][v]);
    }
  }
}

template <class T, int64_t kRows>
void add_rows(const LoraGradientParams& p, const int64_t* tokens, int64_t count, int64_t row,
              int64_t begin, int64_t end, float* out) {
  const auto load_whole = [](const auto* from) { return load(from); };
  const auto store_whole = [](float* to, Vec x) { store(to, x); };
  int64_t n = begin;
  for (; n + kSumVectors * Vec::width <= end; n += kSumVectors * Vec::width) {
    add_products<T, kRows, kSumVectors>(p, tokens, count, row, n, out, load_whole, store_whole);
  }
  for (; n + Vec::width <= end; n += Vec::width) {
    add_products<T, kRows, 1>(p, tokens, count, row, n, out, load_whole, store_whole);
  }
  if (n == end) return;
  add_products<T, kRows, 1>(
      p, tokens, count, row, n, out, [&](const auto* from) { return load_first(from, end - n); },
      [&](float* to, Vec x) { store_first(to, x, end - n); });
}

template <class T>
void sum_columns(const LoraGradientParams& p, int64_t adapter, int64_t begin, int64_t end) {
  float* out = p.out + adapter * p.rank * p.columns;
  for (int64_t row = 0; row < p.rank; ++row) {
    memset(out + row * p.columns + begin, 0, (end - begin) * sizeof(float));
  }
  for (int64_t token = 0; token < p.tokens;) {
    int64_t tokens[kBlockTokens], count = 0;
    for (; token < p.tokens && count < kBlockTokens; ++token) {
      if (p.adapters[token] == adapter) tokens[count++] = token;
    }
    int64_t row = 0;
    for (; row + kSumRows <= p.rank; row += kSumRows) {
      add_rows<T, kSumRows>(p, tokens, count, row, begin, end, out);
    }
    for (; row < p.rank; ++row) add_rows<T, 1>(p, tokens, count, row, begin, end, out);
  }
}

}  // namespace

void lora_gradient(const LoraGradientParams& p, int threads) {
  const int64_t blocks = ceil_div(p.columns, kTaskColumns);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, blocks * p.num_adapters, [&](int64_t task) {
      const int64_t begin = task % blocks * kTaskColumns;
      sum_columns<T>(p, task / blocks, begin, mistral::min(begin + kTaskColumns, p.columns));
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// RMSNorm of one row. The row is read twice, the second time from the cache. The first pass adds
// the residual, if there is one, stores the result, and sums the squares. The second pass scales.
#pragma once

#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kVectorsPerBlock = 32;

// h = x + residual. The sum is rounded to T as a separate addition would round it, so fused and
// unfused ops agree.
template <class T>
MISTRAL_SIMD Vec add_rounded(Vec x, Vec residual) {
  return round_to<T>(x + residual);
}

// Returns sum(h^2). Stores h in `residual` unless `residual` is null. The sum is taken in blocks,
// because one running sum over thousands of elements would lose digits, most of all with one lane.
template <class T>
float add_and_square(const T* x, T* residual, int64_t dim) {
  Vec squares = broadcast(0.0f);
  int64_t i = 0;
  while (i + Vec::width <= dim) {
    const int64_t end = mistral::min(i + kVectorsPerBlock * Vec::width, dim);
    Vec block = broadcast(0.0f);
    for (; i + Vec::width <= end; i += Vec::width) {
      Vec h = load(x + i);
      if (residual) {
        h = add_rounded<T>(h, load(residual + i));
        store(residual + i, h);
      }
      block = fma(h, h, block);
    }
    squares = squares + block;
  }
  if (i < dim) {
    Vec h = load_first(x + i, dim - i);
    if (residual) {
      h = add_rounded<T>(h, load_first(residual + i, dim - i));
      store_first(residual + i, h, dim - i);
    }
    squares = fma(h, h, squares);
  }
  return sum(squares);
}

template <class T>
void scale(const T* h, const T* weight, T* out, int64_t dim, float factor) {
  int64_t i = 0;
  for (; i + Vec::width <= dim; i += Vec::width) {
    store(out + i, round_to<T>(load(h + i) * broadcast(factor)) * load(weight + i));
  }
  if (i < dim) {
    const int64_t n = dim - i;
    const Vec normalised = round_to<T>(load_first(h + i, n) * broadcast(factor));
    store_first(out + i, normalised * load_first(weight + i, n), n);
  }
}

// out = weight * h / sqrt(mean(h^2) + eps), with h = x, or h = residual + x if there is a residual.
template <class T>
void normalise(const T* x, T* residual, const T* weight, T* out, int64_t dim, float eps) {
  const float mean = add_and_square(x, residual, dim) / static_cast<float>(dim);
  scale(residual ? residual : x, weight, out, dim, 1.0f / sqrtf(mean + eps));
}

}  // namespace mistral::cpu::MISTRAL_ISA

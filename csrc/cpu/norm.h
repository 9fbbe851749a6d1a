// RMSNorm of one row, in two passes. The first pass sums the squares. If there is a residual, this
// pass also adds the row to the residual, in place, and takes the squares of the sums. The second
// pass reads the same values again, from the cache, and scales them.
#pragma once

#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kVectorsPerBlock = 32;

// h = x + residual. The sum is rounded to T, as an op that only adds would round it. So fused and
// unfused ops agree.
template <class T>
MISTRAL_SIMD Vec add_rounded(Vec x, Vec residual) {
  return round_to<T>(x + residual);
}

// Returns sum(h^2), with h = x if `residual` is null. Otherwise h = x + residual, which is also
// stored in `residual`. The squares are summed in blocks of kVectorsPerBlock vectors. One running
// sum over thousands of elements would lose digits, most of all on the scalar set, where one lane
// takes all of them.
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

// out = weight * h / sqrt(mean(h^2) + eps), with h as in add_and_square.
template <class T>
void normalise(const T* x, T* residual, const T* weight, T* out, int64_t dim, float eps) {
  const float mean = add_and_square(x, residual, dim) / static_cast<float>(dim);
  scale(residual ? residual : x, weight, out, dim, 1.0f / sqrtf(mean + eps));
}

}  // namespace mistral::cpu::MISTRAL_ISA

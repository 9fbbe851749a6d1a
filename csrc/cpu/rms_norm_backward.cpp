// The gradient of the input of RMSNorm (rms_norm.h). A task computes a block of rows.
#include "../rms_norm.h"

#include "kernels.h"
#include "norm.h"
#include "parallel.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kRowsPerTask = 4;

// Returns sum(x * weight * d_out). The products are summed in blocks, so that the sum loses few
// digits (add_and_square in norm.h).
template <class T>
float weighted_product(const T* x, const T* weight, const T* d_out, int64_t dim) {
  Vec total = broadcast(0.0f);
  int64_t i = 0;
  while (i + Vec::width <= dim) {
    const int64_t end = mistral::min(i + kVectorsPerBlock * Vec::width, dim);
    Vec block = broadcast(0.0f);
    for (; i + Vec::width <= end; i += Vec::width) {
      block = fma(load(x + i) * load(weight + i), load(d_out + i), block);
    }
    total = total + block;
  }
  if (i < dim) {
    const int64_t n = dim - i;
    total = fma(load_first(x + i, n) * load_first(weight + i, n), load_first(d_out + i, n), total);
  }
  return sum(total);
}

// d_x = factor * (weight * d_out - shrink * x), with factor = 1 / sqrt(mean(x^2) + eps) and shrink
// = factor^2 * mean(x * weight * d_out). This is the formula of rms_norm.h, with factor * x in
// place of n.
template <class T>
void input_gradient(const T* x, const T* weight, const T* d_out, T* d_x, int64_t dim, float factor,
                    float shrink) {
  const auto gradient = [&](Vec x, Vec weight, Vec d_out) {
    return broadcast(factor) * (weight * d_out - broadcast(shrink) * x);
  };
  int64_t i = 0;
  for (; i + Vec::width <= dim; i += Vec::width) {
    store(d_x + i, gradient(load(x + i), load(weight + i), load(d_out + i)));
  }
  if (i < dim) {
    const int64_t n = dim - i;
    store_first(d_x + i,
                gradient(load_first(x + i, n), load_first(weight + i, n), load_first(d_out + i, n)),
                n);
  }
}

}  // namespace

void rms_norm_backward(const RmsNormBackwardParams& p, int threads) {
  const auto dim = static_cast<float>(p.dim);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(p.weight);
    parallel_for(threads, ceil_div(p.tokens, kRowsPerTask), [&](int64_t task) {
      const int64_t end = mistral::min((task + 1) * kRowsPerTask, p.tokens);
      for (int64_t token = task * kRowsPerTask; token < end; ++token) {
        const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
        const T* d_out = static_cast<const T*>(p.d_out) + token * p.stride_d_out_token;
        T* d_x = static_cast<T*>(p.d_x) + token * p.stride_d_x_token;
        const float square = add_and_square<T>(x, nullptr, p.dim) / dim;
        const float factor = 1.0f / sqrtf(square + p.eps);
        const float mean = weighted_product(x, weight, d_out, p.dim) / dim;
        input_gradient(x, weight, d_out, d_x, p.dim, factor, mean * factor * factor);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

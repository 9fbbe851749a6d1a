// Grid: one block per row. A thread owns every blockDim-th vector of the row: 16 bytes, or one
// element if rows are not aligned. The row is read once, for its largest logit and the sum of exp.
// If a gradient is wanted, the row is read again, and then usually comes from the L2 cache.
#include "../cross_entropy.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 512;

// The maximum of some logits, and the sum of exp(logit - base()) over them.
struct LogSum {
  float maximum = -INFINITY;
  float total = 0.0f;

  // The number that is subtracted from logits, so that exp does not overflow. It is the maximum, or
  // 0 if all logits are -inf, because -inf - -inf would be NaN.
  __device__ __forceinline__ float base() const { return maximum == -INFINITY ? 0.0f : maximum; }

  template <class T, int N>
  __device__ __forceinline__ void add(const Vec<T, N>& logits) {
    float highest = maximum;
#pragma unroll
    for (int j = 0; j < N; ++j) highest = fmaxf(highest, logits[j]);
    rise(highest);
#pragma unroll
    for (int j = 0; j < N; ++j) total += expf(logits[j] - base());
  }

  // Joins the results of all threads of the block. `shared` has 2 floats per warp.
  __device__ __forceinline__ void join_block(float* shared) {
    rise(block_max(maximum, shared));
    total = block_sum(total, shared + kThreads / kWarp);
  }

 private:
  // Raises the maximum to `highest`, and adapts the total to the new base().
  __device__ __forceinline__ void rise(float highest) {
    // `before` is the old maximum, not the old base(). If it is -inf, the total and its factor are
    // 0. With the old base(), which is 0 then, the factor could be inf, and inf * 0 is NaN.
    const float before = maximum;
    maximum = highest;
    total *= expf(before - base());
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const CrossEntropyParams p) {
  const int64_t token = blockIdx.x, target = load_global(p.targets + token);
  const bool valid = target >= 0 && target < p.vocab;
  T* const logits = static_cast<T*>(p.logits) + token * p.stride_logits_token;
  const float of_target = valid ? to_float(load_global(logits + target)) : NAN;

  LogSum sum;
#pragma unroll 4
  for (int64_t i = threadIdx.x * N; i < p.vocab; i += kThreads * N) sum.add(load<N>(logits + i));
  sum.join_block(dynamic_shared<float>());
  const float base = sum.base();
  if (threadIdx.x == 0) store_global(p.loss + token, logf(sum.total) + (base - of_target));
  if (!p.factors) return;

  const float factor = load_global(p.factors + token);
  const float inverse = valid ? 1.0f / sum.total : NAN;
#pragma unroll 4
  for (int64_t i = threadIdx.x * N; i < p.vocab; i += kThreads * N) {
    const Vec<T, N> values = load<N>(logits + i);
    float gradients[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float probability = expf(values[j] - base) * inverse;
      gradients[j] = factor * (i + j == target ? probability - 1.0f : probability);
    }
    store(logits + i, round_to<T>(gradients));
  }
}

template <class T, int N>
cudaError_t launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  return launch(cross_entropy_kernel<T, N>, dim3(static_cast<unsigned>(p.tokens)), dim3(kThreads),
                2 * kThreads / kWarp * sizeof(float), stream, p);
}

}  // namespace

cudaError_t cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    const bool wide = p.vocab % kWide == 0 && fit_vec16<T>({p.logits}, {p.stride_logits_token});
    return wide ? launch_rows<T, kWide>(p, stream) : launch_rows<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

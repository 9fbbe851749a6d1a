// Grid: one block per row. A thread owns every blockDim-th vector of the row: 16 bytes, or one
// element if rows are not aligned. The row is read once for the sums of x^2 and of
// x * weight * d_out, and again for the gradient. The second time it usually comes from a cache.
#include "../rms_norm.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kMaxThreads = 512;

template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads, 2)
    rms_norm_backward_kernel(const RmsNormBackwardParams p) {
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  const T* d_out = static_cast<const T*>(p.d_out) + token * p.stride_d_out_token;
  T* d_x = static_cast<T*>(p.d_x) + token * p.stride_d_x_token;
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t first = int64_t{threadIdx.x} * N, step = int64_t{blockDim.x} * N;

  float squares = 0.0f, products = 0.0f;
  for (int64_t i = first; i < p.dim; i += step) {
    const auto h = load<N>(x + i), w = load<N>(weight + i), d = load<N>(d_out + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      squares += h[j] * h[j];
      products += h[j] * w[j] * d[j];
    }
  }
  float* shared = dynamic_shared<float>();
  const auto dim = static_cast<float>(p.dim);
  const float factor = 1.0f / sqrtf(block_sum(squares, shared) / dim + p.eps);
  __syncthreads();  // all threads have read the first sum, so `shared` can be used again
  const float mean = block_sum(products, shared) / dim;

  const float shrink = mean * factor * factor;
  for (int64_t i = first; i < p.dim; i += step) {
    const auto h = load<N>(x + i), w = load<N>(weight + i), d = load<N>(d_out + i);
    float gradient[N];
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] = factor * (w[j] * d[j] - shrink * h[j]);
    store(d_x + i, round_to<T>(gradient));
  }
}

template <class T, int N>
cudaError_t launch_rows(const RmsNormBackwardParams& p, cudaStream_t stream) {
  const int64_t threads = min(ceil_div(ceil_div(p.dim, N), kWarp) * kWarp, kMaxThreads);
  return launch(rms_norm_backward_kernel<T, N>, dim3(static_cast<unsigned>(p.tokens)),
                dim3(static_cast<unsigned>(threads)), kWarp * sizeof(float), stream, p);
}

}  // namespace

cudaError_t rms_norm_backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  if (p.dim == 0) return cudaSuccess;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    const bool wide = p.dim % kWide == 0 &&
                      fit_vec16<T>({p.x, p.weight, p.d_out, p.d_x},
                                   {p.stride_x_token, p.stride_d_out_token, p.stride_d_x_token});
    return wide ? launch_rows<T, kWide>(p, stream) : launch_rows<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

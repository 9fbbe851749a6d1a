// Grid: one block per row. A thread owns every blockDim-th vector of the row: 16 bytes, or one
// element if rows are not aligned. A thread holds up to kHeld vectors in registers. What a block
// holds at a time is a part of the row. If the row is one part, it stays in the registers from the
// sum of squares to the scaling, so that it is read only once. Of a longer row only the last part
// stays there, and the other parts are read again for the scaling.
#include "../rms_norm.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "norm.cuh"

namespace mistral::cuda {
namespace {

constexpr int kHeld = 4;
constexpr int kMaxThreads = 512;

// x + residual, rounded to T. torch's addition rounds in the same way, so the fused op has the
// result of the separate ops.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> add(const Vec<T, N>& x, const Vec<T, N>& residual) {
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = x[i] + residual[i];
  return round_to<T>(sum);
}

// The launch bounds limit a thread to 64 registers. So a multiprocessor has room for 1024 threads,
// and some can load while others wait at a barrier.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads, 2) rms_norm_kernel(const RmsNormParams p) {
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  T* residual =
      p.residual ? static_cast<T*>(p.residual) + token * p.stride_residual_token : nullptr;
  T* out = static_cast<T*>(p.out) + token * p.stride_out_token;
  const T* weight = static_cast<const T*>(p.weight);

  const int dim = static_cast<int>(p.dim), part = static_cast<int>(blockDim.x) * kHeld * N;
  const int last = (dim - 1) / part * part;  // the first element of the last part
  const auto position = [&](int begin, int k) {
    return begin + static_cast<int>(k * blockDim.x + threadIdx.x) * N;
  };
  // Loads a part of a row. Elements past the end of the row are zeros.
  const auto load_part = [&](Vec<T, N>(&held)[kHeld], const T* row, int begin) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = position(begin, k);
      held[k] = i < dim ? load<N>(row + i) : Vec<T, N>{};
    }
  };

  Vec<T, N> h[kHeld], other[kHeld];
  float squares = 0.0f;
  for (int begin = 0; begin <= last; begin += part) {
    load_part(h, x, begin);
    if (residual) {
      load_part(other, residual, begin);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        h[k] = add(h[k], other[k]);
        if (position(begin, k) < dim) store(residual + position(begin, k), h[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) squares += h[k][j] * h[k][j];
    }
  }

  load_part(other, weight, last);  // these loads are under way during block_sum
  const float sum = block_sum(squares, dynamic_shared<float>());
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(p.dim) + p.eps);

  // Goes from the last part to the first, because the registers still hold the last part.
  for (int begin = last; begin >= 0; begin -= part) {
    if (begin != last) {
      load_part(h, residual ? residual : x, begin);
      load_part(other, weight, begin);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = position(begin, k);
      if (i < dim) store(out + i, scaled(h[k], other[k], factor));
    }
  }
}

template <class T, int N>
cudaError_t launch_rows(const RmsNormParams& p, cudaStream_t stream) {
  const int64_t threads = min(ceil_div(ceil_div(p.dim, kHeld * N), kWarp) * kWarp, kMaxThreads);
  return launch(rms_norm_kernel<T, N>, dim3(static_cast<unsigned>(p.tokens)),
                dim3(static_cast<unsigned>(threads)), kWarp * sizeof(float), stream, p);
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.dim == 0) return cudaSuccess;
  if (p.dim > INT32_MAX / 2) return cudaErrorInvalidValue;  // the kernel counts in ints
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    const bool wide = p.dim % kWide == 0 &&
                      fit_vec16<T>({p.x, p.weight, p.residual, p.out},
                                   {p.stride_x_token, p.stride_residual_token, p.stride_out_token});
    return wide ? launch_rows<T, kWide>(p, stream) : launch_rows<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

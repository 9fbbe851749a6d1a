// Three launches compute, in this order, delta (attention_backward.h) of every query row, the
// gradients of keys and values, and the gradients of queries. In the second launch a block owns
// keys, in the third it owns query rows. So one block alone adds up each gradient, without atomic
// additions. The price is that both launches compute all scores. Otherwise the kernels follow
// FlashAttention-2 (Dao 2023, arXiv:2307.08691).
#include "../../attention_backward.h"

#include <launch.cuh>

#include "../../attention.h"
#include "backward_keys.cuh"
#include "backward_queries.cuh"

namespace mistral::cuda {
namespace {

constexpr int kDeltaThreads = 256;

// Computes delta. Grid: one thread for each 16 bytes of d_out. The threads that share a row are
// neighbours.
template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kThreads = D / kVec16<T>;  // threads of a row
  const int64_t item = int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x, row = item / kThreads;
  const bool valid = row < p.tokens * p.heads;
  float delta = 0.0f;
  if (valid) {
    const Vec16<T> out = load16(static_cast<const T*>(p.out) + item * kVec16<T>);
    const Vec16<T> d_out = load16(static_cast<const T*>(p.d_out) + item * kVec16<T>);
#pragma unroll
    for (int i = 0; i < kVec16<T>; ++i) delta += out[i] * d_out[i];
  }
#pragma unroll
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    delta += __shfl_xor_sync(kAllLanes, delta, distance);
  }
  if (valid && item % kThreads == 0) store_global(p.delta + row, delta);
}

template <class T, int D>
cudaError_t launch_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t chunks = p.tokens * p.heads * D / kVec16<T>;
  cudaError_t status =
      launch(attention_delta<T, D>, dim3(static_cast<unsigned>(ceil_div(chunks, kDeltaThreads))),
             dim3(kDeltaThreads), 0, stream, p);
  if (status != cudaSuccess) return status;
  const auto grid = [&](int64_t group) {
    return dim3(static_cast<unsigned>(tiles_of_all<kOwnRows>(p, group)),
                static_cast<unsigned>(p.kv_heads));
  };
  status = launch(attention_backward_keys<T, D>, grid(1), dim3(kBackwardThreads),
                  BackwardShared<T, D>::kBytesWithStatistics, stream, p);
  if (status != cudaSuccess) return status;
  return launch(attention_backward_queries<T, D>, grid(p.heads / p.kv_heads),
                dim3(kBackwardThreads), BackwardShared<T, D>::kBytes, stream, p);
}

template <class T>
cudaError_t launch_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_backward<T, 64>(p, stream);
    case 128: return launch_backward<T, 128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t attention_backward(const AttentionBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::bf16: return launch_backward<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_backward<__half>(p, stream);
    case DType::f32: return cudaErrorInvalidValue;  // tensor cores have no fp32 product
  }
  return cudaErrorInvalidValue;
}

}  // namespace mistral::cuda

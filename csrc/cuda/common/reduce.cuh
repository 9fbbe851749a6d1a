// Sums and maxima over a warp and over a block.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

namespace mistral::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  static constexpr float kOfNothing = 0.0f;  // the sum of no values
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

struct Maximum {
  static constexpr float kOfNothing = -INFINITY;  // the maximum of no values
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces the values of all lanes of a warp. Every lane gets the same bits.
template <class Operation>
__device__ __forceinline__ float reduce_warp(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = Operation::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Reduces the values of all threads of a block, and returns the result to every thread. The block
// must consist of whole warps. `shared` has one float per warp. All threads read it at the end, so
// the caller must put a barrier before the next write to it.
template <class Operation>
__device__ __forceinline__ float reduce_block(float value, float* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = reduce_warp<Operation>(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return reduce_warp<Operation>(lane < warps ? shared[lane] : Operation::kOfNothing);
}

__device__ __forceinline__ float warp_sum(float value) { return reduce_warp<Sum>(value); }
__device__ __forceinline__ float block_sum(float value, float* shared) {
  return reduce_block<Sum>(value, shared);
}
__device__ __forceinline__ float block_max(float value, float* shared) {
  return reduce_block<Maximum>(value, shared);
}

}  // namespace mistral::cuda

// The RMSNorm of x before a product. If there are few rows and they fit in the shared memory of a
// block, each block normalises them itself. Otherwise an earlier kernel writes normalised rows to
// global memory. Both ways give the same bits.
#pragma once

#include "../../linear.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "../norm.cuh"
#include "weight_stream.cuh"

namespace mistral::cuda {

// The most tokens that a block normalises itself. The next larger kernel takes up to 32 tokens, but
// 32 rows of K = 4096 would take more shared memory than a block can have.
constexpr int kNormTokens = 16;

// The number of elements from one row of normalised x in shared memory to the next. A row is padded
// with zeros to whole chunks. W::kRowPadding more bytes keep reads in different banks.
template <class W>
MISTRAL_HOST_DEVICE int normalised_row(int64_t inputs) {
  return static_cast<int>(ceil_div(inputs, W::kValues)) * W::kValues +
         W::kRowPadding / static_cast<int>(sizeof(typename W::Element));
}

// Rows in shared memory. A thread keeps its elements of x there, and later normalises them in
// place. So a block reads x from global memory only once.
template <class T>
struct RowsInShared {
  T* rows;
  int stride;

  __device__ __forceinline__ void keep(int i, int k, const Vec16<T>& v) const { store(i, k, v); }
  __device__ __forceinline__ Vec16<T> kept(int i, int k) const {
    return load_shared16(rows + i * stride + k);
  }
  __device__ __forceinline__ void store(int i, int k, const Vec16<T>& v) const {
    store_shared16(rows + i * stride + k, v);
  }
};

// A row in global memory. It may be too long for shared memory, so x is read again instead of being
// kept.
template <class T>
struct RowInGlobal {
  const T* x;
  T* out;

  __device__ __forceinline__ void keep(int, int, const Vec16<T>&) const {}
  __device__ __forceinline__ Vec16<T> kept(int, int k) const { return load16(x + k); }
  __device__ __forceinline__ void store(int, int k, const Vec16<T>& v) const {
    store16(out + k, v);
  }
};

// Normalises `count` tokens, at most kTokens, from token `first` on. All threads of the block call
// this. The first pass over x sums the squares, the second normalises. `rows` is RowsInShared or
// RowInGlobal: it provides x to the second pass, and stores the results. `sums` is shared memory
// for kTokens * kLinearWarps floats. If the results are in shared memory, the caller must put a
// barrier after the call.
template <class T, int kTokens, class Rows>
__device__ __forceinline__ void normalise_rows(const LinearParams& p, int64_t first, int count,
                                               float* sums, const Rows& rows) {
  constexpr int kStep = kLinearThreads * kVec16<T>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int inputs = static_cast<int>(p.inputs), begin = threadIdx.x * kVec16<T>;
  const T* x = static_cast<const T*>(p.x) + first * p.stride_x_token;

  float squares[kTokens] = {}, factors[kTokens];
  for (int k = begin; k < inputs; k += kStep) {
    Vec16<T> h[kTokens];  // the loads of all tokens are under way together
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      h[i] = i < count ? load16(x + i * p.stride_x_token + k) : Vec16<T>{};
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int j = 0; j < kVec16<T>; ++j) squares[i] += h[i][j] * h[i][j];
      if (i < count) rows.keep(i, k, h[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const float sum = warp_sum(squares[i]);
    if (lane == 0) sums[i * kLinearWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kLinearWarps; ++w) sum += sums[i * kLinearWarps + w];
    factors[i] = 1.0f / sqrtf(sum / static_cast<float>(p.inputs) + p.eps);
  }
  for (int k = begin; k < inputs; k += kStep) {
    const Vec16<T> weight = load16(static_cast<const T*>(p.norm) + k);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < count) rows.store(i, k, scaled(rows.kept(i, k), weight, factors[i]));
    }
  }
}

// Normalises x into rows of shared memory, which are normalised_row elements apart. `sums` is
// shared memory for 8 * kN * kLinearWarps floats. The caller must put a barrier after the call.
template <class W, int kN>
__device__ __forceinline__ void normalise_x(const LinearParams& p, typename W::Element* rows,
                                            float* sums, int chunks) {
  using T = typename W::Element;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int inputs = static_cast<int>(p.inputs), count = static_cast<int>(p.tokens);
  const int stride = normalised_row<W>(p.inputs);
  // Takes 8 tokens at a time, because registers are scarce. Each 8 tokens have their own part of
  // `sums`, so no barrier is needed in between.
#pragma unroll 1
  for (int n = 0; n < kN; ++n) {
    normalise_rows<T, 8>(p, 8 * n, min(count - 8 * n, 8), sums + n * 8 * kLinearWarps,
                         RowsInShared<T>{rows + 8 * n * stride, stride});
  }
  for (int i = warp; i < count; i += kLinearWarps) {
    for (int k = inputs + lane * 8; k < chunks * W::kValues; k += kWarp * 8) {
      store_shared16(rows + i * stride + k, Vec16<T>{});
    }
  }
}

// Writes normalised rows [T, K] to p.scratch. Grid: one block per token.
template <class T>
__global__ void __launch_bounds__(kLinearThreads)
    linear_norm_kernel(const __grid_constant__ LinearParams p) {
  const RowInGlobal<T> row = {static_cast<const T*>(p.x) + blockIdx.x * p.stride_x_token,
                              static_cast<T*>(p.scratch) + blockIdx.x * p.inputs};
  normalise_rows<T, 1>(p, blockIdx.x, 1, dynamic_shared<float>(), row);
}

}  // namespace mistral::cuda

// The gradient of the stacked A or B (lora.h). Grid: (tiles of columns, tiles of rows, adapters). A
// block owns a tile of one adapter's gradient, so no two blocks add to the same sum. The tokens are
// divided among groups of 4 neighbouring threads. Each of the 4 threads sums its own columns of the
// tile: 16 bytes of a row of x, or one element if the rows of x are not aligned. At the end the
// sums of the groups are added, first within a warp and then over the warps.
#include "../lora.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 8;      // rows of a tile
constexpr int kAccesses = 4;  // threads of a group, each of which loads once from a row of x
constexpr int kGroups = kThreads / kAccesses;

template <class T, int N>
struct Tile {
  static constexpr int kColumns = kAccesses * N;

  const LoraGradientParams& p;
  int64_t adapter, first_row, column;  // `column` is the first column of the thread
  int rows;                            // rows of the tile that exist, at most kRows

  __device__ __forceinline__ void sum_tokens(float (&sums)[kRows][N]) const {
    if (column >= p.columns) return;
    for (int64_t token = threadIdx.x / kAccesses; token < p.tokens; token += kGroups) {
      if (load_global(p.adapters + token) != adapter) continue;
      const auto x = load<N>(static_cast<const T*>(p.x) + token * p.stride_x_token + column);
      const float* const hidden = p.hidden + token * p.stride_hidden_token + first_row;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float factor = r < rows ? load_global(hidden + r) : 0.0f;
#pragma unroll
        for (int j = 0; j < N; ++j) sums[r][j] += factor * x[j];
      }
    }
  }

  // Adds the sums of all groups and stores the result. `shared` is [warps, kRows, kColumns].
  __device__ __forceinline__ void store_sums(float (&sums)[kRows][N], float* shared) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int distance = kAccesses; distance < kWarp; distance *= 2) {
          sums[r][j] += __shfl_xor_sync(kAllLanes, sums[r][j], distance);
        }
        if (lane < kAccesses) shared[(warp * kRows + r) * kColumns + lane * N + j] = sums[r][j];
      }
    }
    __syncthreads();
    const int64_t first_column = column - threadIdx.x % kAccesses * N;
    for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
      const int64_t row = first_row + i / kColumns, n = first_column + i % kColumns;
      if (n >= p.columns) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[w * kRows * kColumns + i];
      store_global(p.out + (adapter * p.rank + row) * p.columns + n, sum);
    }
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads) lora_gradient_kernel(const LoraGradientParams p) {
  const int64_t first_row = int64_t{blockIdx.y} * kRows;
  const Tile<T, N> tile = {p, blockIdx.z, first_row,
                           (int64_t{blockIdx.x} * kAccesses + threadIdx.x % kAccesses) * N,
                           static_cast<int>(min(kRows, p.rank - first_row))};
  float sums[kRows][N] = {};
  tile.sum_tokens(sums);
  tile.store_sums(sums, dynamic_shared<float>());
}

template <class T, int N>
cudaError_t launch_tiles(const LoraGradientParams& p, cudaStream_t stream) {
  constexpr int kColumns = Tile<T, N>::kColumns;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, kColumns)),
                  static_cast<unsigned>(ceil_div(p.rank, kRows)),
                  static_cast<unsigned>(p.num_adapters));
  return launch(lora_gradient_kernel<T, N>, grid, dim3(kThreads),
                kWarps * kRows * kColumns * sizeof(float), stream, p);
}

}  // namespace

cudaError_t lora_gradient(const LoraGradientParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    const bool wide = p.columns % kWide == 0 && fit_vec16<T>({p.x}, {p.stride_x_token});
    return wide ? launch_tiles<T, kWide>(p, stream) : launch_tiles<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

// There are two launches. The first computes hidden = scale * (x A^T) (shrink), the second adds
// hidden B to `out` (expand).
//
// shrink: a block computes a tile of `hidden`, kTile tokens by kTile rows of one part of A. Its
// threads divide each row of x and A among them, so that many loads of a row are under way at once.
// A thread owns every blockDim-th vector: 16 bytes, or one element if rows are not aligned.
//
// expand: a thread owns one vector of outputs for kTile tokens, and goes through the rows of B.
//
// In decode steps, which have few tokens, a tile has one token (kTile = 1), so that there are more
// blocks. In prompts tiles are larger, so that A and B are read fewer times. If the tokens of a
// tile use different adapters, the tile is computed token by token. An output is summed in the same
// order whatever the size of the tile.
#include "../lora.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kShrinkThreads = 256;
constexpr int kShrinkWarps = kShrinkThreads / kWarp;
constexpr int kExpandThreads = 128;
constexpr int kLargeTile = 4;
constexpr int64_t kMostDecodeTokens = 64;  // with more tokens, tiles have kLargeTile tokens

// How many tokens of the tile that begins at `token` are computed together: kTile if the tile is
// full and all its tokens use the same adapter, else 1.
template <int kTile>
__device__ __forceinline__ int tokens_at_once(const LoraParams& p, int64_t token) {
  if (token + kTile > p.tokens) return 1;
  bool alike = true;
#pragma unroll
  for (int t = 1; t < kTile; ++t) {
    alike = alike && load_global(p.adapters + token + t) == load_global(p.adapters + token);
  }
  return alike ? kTile : 1;
}

// Multiplies kTokens tokens of one adapter, from `token` on, by rows [first, first + kRows) of one
// part of A. Rows beyond the adapter's rank are left out.
template <class T, int N, int kTokens, int kRows>
__device__ __forceinline__ void shrink(const LoraParams& p, int64_t token, int64_t part,
                                       int64_t first) {
  const int64_t adapter = load_global(p.adapters + token);
  if (adapter < 0) return;
  const int64_t of_part = adapter * p.num_parts + part;
  const int64_t rows = min(kRows, load_global(p.ranks + of_part) - first);
  if (rows <= 0) return;
  const T* a = static_cast<const T*>(p.a) + (of_part * p.max_rank + first) * p.inputs;
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;

  float sums[kRows][kTokens] = {};
  for (int64_t i = threadIdx.x * N; i < p.inputs; i += kShrinkThreads * N) {
    Vec<T, N> inputs[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) inputs[t] = load<N>(x + t * p.stride_x_token + i);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) break;
      const Vec<T, N> weights = load<N>(a + row * p.inputs + i);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[row][t] += weights[j] * inputs[t][j];
      }
    }
  }

  float* shared = dynamic_shared<float>();  // [kRows * kTokens, warps]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // no thread still reads the sums of an earlier call
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float sum = warp_sum(sums[row][t]);
      if (lane == 0) shared[(row * kTokens + t) * kShrinkWarps + warp] = sum;
    }
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= rows * kTokens) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kShrinkWarps; ++w) sum += shared[i * kShrinkWarps + w];
  float* hidden = p.hidden + ((token + i % kTokens) * p.num_parts + part) * p.max_rank + first;
  store_global(hidden + i / kTokens, load_global(p.scales + of_part) * sum);
}

// Grid: (tiles of tokens, blocks of kTile rows of A in all parts).
template <class T, int N, int kTile>
__global__ void __launch_bounds__(kShrinkThreads) shrink_kernel(const LoraParams p) {
  let_later_kernels_begin();
  wait_for_earlier_kernels();
  const int64_t blocks = ceil_div(p.max_rank, kTile);
  const int64_t part = blockIdx.y / blocks, first = blockIdx.y % blocks * kTile;
  const int64_t begin = int64_t{blockIdx.x} * kTile, end = min(begin + kTile, p.tokens);
  if (tokens_at_once<kTile>(p, begin) == kTile)
    return shrink<T, N, kTile, kTile>(p, begin, part, first);
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    shrink<T, N, 1, kTile>(p, token, part, first);
  }
}

template <class Out, int N>
__device__ __forceinline__ void add(Out* out, const float (&sums)[N]) {
  constexpr int kWidth = N == 1 ? 1 : kVec16<Out>;
#pragma unroll
  for (int i = 0; i < N; i += kWidth) {
    const Vec<Out, kWidth> before = load<kWidth>(out + i);
    float after[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) after[j] = before[j] + sums[i + j];
    store(out + i, round_to<Out>(after));
  }
}

// Computes outputs [column, column + N), which belong to one part, for kTokens tokens of one
// adapter from `token` on.
template <class T, class Out, int N, int kTokens>
__device__ __forceinline__ void expand(const LoraParams& p, int64_t token, int64_t part,
                                       int64_t column) {
  const int64_t adapter = load_global(p.adapters + token);
  if (adapter < 0) return;
  const int rank = load_global(p.ranks + adapter * p.num_parts + part);
  if (rank == 0) return;
  const T* b = static_cast<const T*>(p.b) + adapter * p.max_rank * p.outputs + column;
  const int64_t stride_hidden = p.num_parts * p.max_rank;
  const float* hidden = p.hidden + token * stride_hidden + part * p.max_rank;

  float sums[kTokens][N] = {};
#pragma unroll 4
  for (int r = 0; r < rank; ++r) {
    const Vec<T, N> weights = load<N>(b + r * p.outputs);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float factor = load_global(hidden + t * stride_hidden + r);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[t][j] += factor * weights[j];
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    add(static_cast<Out*>(p.out) + (token + t) * p.stride_out_token + column, sums[t]);
  }
}

// Grid: (tiles of tokens, blocks of outputs of all parts).
template <class T, class Out, int N, int kTile>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(const LoraParams p) {
  let_later_kernels_begin();
  wait_for_earlier_kernels();
  const int64_t column = (int64_t{blockIdx.y} * kExpandThreads + threadIdx.x) * N;
  if (column >= p.outputs) return;
  int64_t part = 0, part_end = p.part_outputs[0];
  while (column >= part_end) part_end += p.part_outputs[++part];
  const int64_t begin = int64_t{blockIdx.x} * kTile, end = min(begin + kTile, p.tokens);
  if (tokens_at_once<kTile>(p, begin) == kTile)
    return expand<T, Out, N, kTile>(p, begin, part, column);
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    expand<T, Out, N, 1>(p, token, part, column);
  }
}

template <class T, class Out, int N, int kTile>
cudaError_t launch_tiles(const LoraParams& p, cudaStream_t stream) {
  const auto grid = [&](int64_t blocks) {  // tokens are in grid.x, as grid.y is at most 65,535
    return dim3(static_cast<unsigned>(ceil_div(p.tokens, kTile)), static_cast<unsigned>(blocks));
  };
  const size_t shared = kTile * kTile * kShrinkWarps * sizeof(float);
  const cudaError_t status = launch_overlapping(shrink_kernel<T, N, kTile>,
                                                grid(p.num_parts * ceil_div(p.max_rank, kTile)),
                                                dim3(kShrinkThreads), shared, stream, p);
  if (status != cudaSuccess) return status;
  return launch_overlapping(expand_kernel<T, Out, N, kTile>,
                            grid(ceil_div(p.outputs, kExpandThreads * N)), dim3(kExpandThreads), 0,
                            stream, p);
}

template <class T, class Out>
cudaError_t launch_rows(const LoraParams& p, cudaStream_t stream) {
  constexpr int kWide = kVec16<T>;
  bool wide = p.inputs % kWide == 0 && fit_vec16<T>({p.x, p.a, p.b}, {p.stride_x_token}) &&
              fit_vec16<Out>({p.out}, {p.stride_out_token});
  for (int64_t i = 0; i < p.num_parts; ++i) wide = wide && p.part_outputs[i] % kWide == 0;
  const bool large = p.tokens > kMostDecodeTokens;
  if (!wide) return launch_tiles<T, Out, 1, 1>(p, stream);
  return large ? launch_tiles<T, Out, kWide, kLargeTile>(p, stream)
               : launch_tiles<T, Out, kWide, 1>(p, stream);
}

}  // namespace

cudaError_t lora(const LoraParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.out_dtype == p.dtype ? launch_rows<T, T>(p, stream) : launch_rows<T, float>(p, stream);
  });
}

}  // namespace mistral::cuda

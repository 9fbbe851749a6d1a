// What the planted bugs of Hopper kernels share. Each file has one kernel that is to multiply
// bf16 matrices, in: a [64, 256] and b [64, 256], out: float a * b^T [64, 64], and does so only
// with kCorrect. The first warpgroup multiplies; TMA brings tiles of 64 columns into two stages.
#pragma once

#include <launch.cuh>
#include <ptx_sm90.cuh>

#include "../../../../csrc/cuda/attention/tensor_map_sm90.h"
#include "../../test_kernels.h"

namespace mistral::cuda {

constexpr int kTile = 64, kTiles = 4, kStages = 2, kMultiplying = 128;
constexpr uint32_t kTileBytes = 2 * kTile * kTile;

struct Inputs {
  CUtensorMap map_a, map_b;
  const __nv_bfloat16 *a, *b;
};

struct alignas(1024) Stages {
  __nv_bfloat16 a[kStages][kTile * kTile], b[kStages][kTile * kTile];
  uint64_t full[kStages], empty[kStages];
};

// By all threads. A stage is released by all threads that multiply.
__device__ inline void init_barriers(Stages& stages, bool fence = true) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&stages.full[i], 1);
      mbarrier_init(&stages.empty[i], kMultiplying);
    }
    if (fence) mbarrier_init_fence();
  }
  __syncthreads();
}

__device__ inline void load(const Inputs& in, Stages& stages, int stage, int tile) {
  tma_load_2d(stages.a[stage], &in.map_a, &stages.full[stage], kTile * tile, 0);
  tma_load_2d(stages.b[stage], &in.map_b, &stages.full[stage], kTile * tile, 0);
}

// By one thread: fills the stages as they become empty.
__device__ inline void produce(const Inputs& in, Stages& stages) {
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    mbarrier_wait(&stages.empty[stage], (tile / kStages + 1) % 2);
    mbarrier_arrive_expect(&stages.full[stage], 2 * kTileBytes);
    load(in, stages, stage, tile);
  }
}

// f(to, from) for each 16 bytes of a tile that the thread is to copy, one of kThreads.
template <int kThreads, class F>
__device__ void for_each_chunk(const Inputs& in, Stages& stages, int stage, int tile, F f) {
  for (int i = threadIdx.x % kThreads; i < kTile * kTile / 8; i += kThreads) {
    const int row = i / 8, from = row * kTile * kTiles + tile * kTile + i % 8 * 8;
    const int to = row * kTile + (i ^ row) % 8 * 8;
    f(stages.a[stage] + to, in.a + from);
    f(stages.b[stage] + to, in.b + from);
  }
}

// Starts the products of one tile.
__device__ inline void multiply(float (&d)[32], const Stages& stages, int stage,
                                uint32_t stride = 1024) {
  for (int k = 0; k < kTile; k += 16) {
    wgmma_m64<__nv_bfloat16, 64, false>(d, wgmma_descriptor(stages.a[stage] + k, 0, 1024),
                                        wgmma_descriptor(stages.b[stage] + k, 0, stride), true);
  }
}

// Waits for a tile, multiplies and releases it.
__device__ inline void consume(float (&d)[32], Stages& stages, int tile) {
  const int stage = tile % kStages;
  mbarrier_wait(&stages.full[stage], tile / kStages % 2);
  wgmma_settle(d);
  wgmma_fence();
  multiply(d, stages, stage);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_settle(d);
  mbarrier_arrive(&stages.empty[stage]);
}

__device__ inline void store(float* out, const float (&d)[32]) {
  const int thread = threadIdx.x, row = thread / 32 * 16 + thread / 4 % 8;
  for (int i = 0; i < 32; ++i) {
    st_global(out + (row + i / 2 % 2 * 8) * kTile + i / 4 * 8 + thread % 4 * 2 + i % 2, d[i]);
  }
}

using PlantedHopper = void (*)(Inputs in, float* out);

inline cudaError_t run_planted(PlantedHopper wrong, PlantedHopper correct, unsigned threads,
                               const Arguments& a, bool overlaps = false) {
  constexpr uint64_t kRow = kTile * kTiles;
  const TensorMapShape shape{2, {kRow, kTile}, {0, 2 * kRow}, {kTile, kTile}};
  Inputs in;
  in.a = static_cast<const __nv_bfloat16*>(a.in);
  in.b = in.a + kTile * kRow;
  cudaError_t status = make_tensor_map(&in.map_a, in.a, shape);
  if (status == cudaSuccess) status = make_tensor_map(&in.map_b, in.b, shape);
  if (status != cudaSuccess) return status;
  const auto start = [&](auto launch) {
    return launch(a.n ? correct : wrong, 1, dim3(threads), sizeof(Stages), nullptr, in,
                  static_cast<float*>(a.out));
  };
  if (overlaps) {
    return start([](auto... arguments) { return launch_overlapping(arguments...); });
  }
  return start([](auto... arguments) { return launch(arguments...); });
}

}  // namespace mistral::cuda

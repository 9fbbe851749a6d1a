// One lane tells the producer that a stage is empty, while others of its warp may still read it.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void lone_release(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  if (threadIdx.x == 0) {
    mbarrier_init(&stages.full[0], 1);
    mbarrier_init(&stages.empty[0], kMultiplying / 32);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kMultiplying) {
    for (int tile = 0; tile < kTiles && threadIdx.x == kMultiplying; ++tile) {
      mbarrier_wait(&stages.empty[0], (tile + 1) % 2);
      mbarrier_arrive_expect(&stages.full[0], 2 * kTileBytes);
      load(in, stages, 0, tile);
    }
    return;
  }
  float d[32] = {};
  const int warp = threadIdx.x / 32;
  for (int tile = 0; tile < kTiles; ++tile) {
    mbarrier_wait(&stages.full[0], tile % 2);
    uint32_t a[kTile / 16][4];
    const int first = threadIdx.x % 16 + warp * 16, half = threadIdx.x / 16 % 2;
    for (int k = 0; k < kTile / 16; ++k) {
      ldmatrix_x4(a[k], stages.a[0] + first * kTile + (2 * k + half ^ first) % 8 * 8);
    }
    wgmma_settle(d);
    wgmma_settle(a);
    wgmma_fence();
    for (int k = 0; k < kTile / 16; ++k) {
      wgmma_m64<__nv_bfloat16, 64, false>(d, a[k], wgmma_descriptor(stages.b[0] + 16 * k, 0, 1024),
                                          true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    if (kCorrect) __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&stages.empty[0]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_lone_release(const Arguments& a) {
  return run_planted(lone_release<false>, lone_release<true>, 160, a);
}

}  // namespace mistral::cuda

// Multiplies what all warps of the warpgroup have stored, without a barrier: wgmma is none.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_warpgroup_barrier(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    for_each_chunk<kMultiplying>(
        in, stages, 0, tile,
        [](__nv_bfloat16* to, const __nv_bfloat16* from) { st_shared_16(to, ld_global_16(from)); });
    fence_proxy_async();
    if (kCorrect) named_barrier_sync(1, kMultiplying);
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    __syncthreads();
  }
  store(out, d);
}

}  // namespace

cudaError_t run_missing_warpgroup_barrier(const Arguments& a) {
  return run_planted(missing_warpgroup_barrier<false>, missing_warpgroup_barrier<true>, 128, a);
}

}  // namespace mistral::cuda

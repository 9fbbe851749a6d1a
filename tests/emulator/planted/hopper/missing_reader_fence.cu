// One warp copies with cp.async and leaves it to a barrier to say when all is there. It cannot call
// the fence then, so those that multiply have to.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_reader_fence(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  if (threadIdx.x == 0) mbarrier_init(&stages.full[0], 32);
  if (threadIdx.x == 0) mbarrier_init(&stages.empty[0], kMultiplying);
  __syncthreads();
  if (threadIdx.x >= kMultiplying) {
    for (int tile = 0; tile < kTiles; ++tile) {
      mbarrier_wait(&stages.empty[0], (tile + 1) % 2);
      for_each_chunk<32>(in, stages, 0, tile, [](__nv_bfloat16* to, const __nv_bfloat16* from) {
        cp_async_16(to, from, true);
      });
      cp_async_arrive(&stages.full[0]);
    }
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    mbarrier_wait(&stages.full[0], tile % 2);
    if (kCorrect) fence_proxy_async();
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    mbarrier_arrive(&stages.empty[0]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_missing_reader_fence(const Arguments& a) {
  return run_planted(missing_reader_fence<false>, missing_reader_fence<true>, 160, a);
}

}  // namespace mistral::cuda

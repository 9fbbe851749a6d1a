// Two warps do not agree on how many come to a barrier.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_count(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  if (threadIdx.x >= kMultiplying) {
    for (int tile = 0; tile < kTiles; ++tile) {
      named_barrier_sync(1, 160);
      named_barrier_arrive(2, kCorrect ? 160 : 128);
    }
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    for_each_chunk<kMultiplying>(
        in, stages, 0, tile,
        [](__nv_bfloat16* to, const __nv_bfloat16* from) { st_shared_16(to, ld_global_16(from)); });
    fence_proxy_async();
    named_barrier_sync(1, 160);
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    named_barrier_sync(2, 160);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_wrong_count(const Arguments& a) {
  return run_planted(wrong_count<false>, wrong_count<true>, 160, a);
}

}  // namespace mistral::cuda

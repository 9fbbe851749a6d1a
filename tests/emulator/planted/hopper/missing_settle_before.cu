// Sets accumulators and calls wgmma_fence, but not wgmma_settle before: the compiler may set them
// after the fence.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_settle_before(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32];
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    mbarrier_wait(&stages.full[stage], tile / kStages % 2);
    if (tile == 0) {
      for (int i = 0; i < 32; ++i) d[i] = 0.0f;
    }
    if (kCorrect) wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, stage);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    mbarrier_arrive(&stages.empty[stage]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_missing_settle_before(const Arguments& a) {
  return run_planted(missing_settle_before<false>, missing_settle_before<true>, 160, a);
}

}  // namespace mistral::cuda

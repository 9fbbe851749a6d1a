// Uses the sums of each tile after the wait for them, and calls wgmma_settle only for the next
// product: the compiler may use them before the wait.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_settle(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  float sums[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    mbarrier_wait(&stages.full[stage], tile / kStages % 2);
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, stage);
    wgmma_commit();
    wgmma_wait<0>();
    if (kCorrect) wgmma_settle(d);
    mbarrier_arrive(&stages.empty[stage]);
    for (int i = 0; i < 32; ++i) {
      sums[i] += d[i];
      d[i] = 0;
    }
  }
  wgmma_settle(d);
  store(out, sums);
}

}  // namespace

cudaError_t run_missing_settle(const Arguments& a) {
  return run_planted(missing_settle<false>, missing_settle<true>, 160, a);
}

}  // namespace mistral::cuda

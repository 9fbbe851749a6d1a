// Releases a stage before it has waited for the products that read it.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void released_too_early(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    const int stage = tile % kStages;
    mbarrier_wait(&stages.full[stage], tile / kStages % 2);
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, stage);
    wgmma_commit();
    if (kCorrect) wgmma_wait<0>();
    mbarrier_arrive(&stages.empty[stage]);
    if (!kCorrect) wgmma_wait<0>();
    wgmma_settle(d);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_released_too_early(const Arguments& a) {
  return run_planted(released_too_early<false>, released_too_early<true>, 160, a);
}

}  // namespace mistral::cuda

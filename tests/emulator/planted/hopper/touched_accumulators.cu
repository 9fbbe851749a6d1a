// Zeroes the accumulators of the next tile while a product still has them.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void touched_accumulators(const __grid_constant__ Inputs in, float* out) {
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
    if (kCorrect) {
      for (int i = 0; i < 32; ++i) d[i] = 0;
    }
    wgmma_settle(d);
    wgmma_fence();
    multiply(d, stages, stage);
    wgmma_commit();
    if (!kCorrect) {
      for (int i = 0; i < 32; ++i) d[i] = 0;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    mbarrier_arrive(&stages.empty[stage]);
    for (int i = 0; i < 32; ++i) sums[i] += d[i];
  }
  store(out, sums);
}

}  // namespace

cudaError_t run_touched_accumulators(const Arguments& a) {
  return run_planted(touched_accumulators<false>, touched_accumulators<true>, 160, a);
}

}  // namespace mistral::cuda

// Reads the accumulators before the last products are waited for.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_wgmma_wait(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile + 1 < kTiles; ++tile) consume(d, stages, tile);
  const int stage = (kTiles - 1) % kStages;
  mbarrier_wait(&stages.full[stage], (kTiles - 1) / kStages % 2);
  wgmma_settle(d);
  wgmma_fence();
  multiply(d, stages, stage);
  wgmma_commit();
  if (!kCorrect) store(out, d);
  wgmma_wait<0>();
  wgmma_settle(d);
  if (kCorrect) store(out, d);
}

}  // namespace

cudaError_t run_missing_wgmma_wait(const Arguments& a) {
  return run_planted(missing_wgmma_wait<false>, missing_wgmma_wait<true>, 160, a);
}

}  // namespace mistral::cuda

// Describes 8 rows of b as half as far apart as they are.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_stride(const __grid_constant__ Inputs in, float* out) {
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
    multiply(d, stages, stage, kCorrect ? 1024 : 512);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    mbarrier_arrive(&stages.empty[stage]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_wrong_stride(const Arguments& a) {
  return run_planted(wrong_stride<false>, wrong_stride<true>, 160, a);
}

}  // namespace mistral::cuda

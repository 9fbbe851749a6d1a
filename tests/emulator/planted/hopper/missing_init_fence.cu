// Has TMA report to barriers that it may not know of.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_init_fence(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages, kCorrect);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) consume(d, stages, tile);
  store(out, d);
}

}  // namespace

cudaError_t run_missing_init_fence(const Arguments& a) {
  return run_planted(missing_init_fence<false>, missing_init_fence<true>, 160, a);
}

}  // namespace mistral::cuda

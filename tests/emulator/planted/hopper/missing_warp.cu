// One warp of the warpgroup leaves out a product.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_warp(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles || kCorrect) {
      consume(d, stages, tile);
    } else if (threadIdx.x >= 32) {
      consume(d, stages, tile);
    }
  }
  store(out, d);
}

}  // namespace

cudaError_t run_missing_warp(const Arguments& a) {
  return run_planted(missing_warp<false>, missing_warp<true>, 160, a);
}

}  // namespace mistral::cuda

// Waits for more bytes than TMA brings.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_bytes(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x == kMultiplying) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      mbarrier_wait(&stages.empty[stage], (tile / kStages + 1) % 2);
      mbarrier_arrive_expect(&stages.full[stage], (kCorrect ? 2 : 3) * kTileBytes);
      load(in, stages, stage, tile);
    }
  }
  if (threadIdx.x >= kMultiplying) return;
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) consume(d, stages, tile);
  store(out, d);
}

}  // namespace

cudaError_t run_wrong_bytes(const Arguments& a) {
  return run_planted(wrong_bytes<false>, wrong_bytes<true>, 160, a);
}

}  // namespace mistral::cuda

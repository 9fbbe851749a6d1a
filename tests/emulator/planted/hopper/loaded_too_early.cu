// TMA reads the input while the kernel that writes it may still run.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void loaded_too_early(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (kCorrect) wait_for_earlier_kernels();
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    if (!kCorrect) wait_for_earlier_kernels();
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) consume(d, stages, tile);
  if (!kCorrect) wait_for_earlier_kernels();
  store(out, d);
}

}  // namespace

cudaError_t run_loaded_too_early(const Arguments& a) {
  return run_planted(loaded_too_early<false>, loaded_too_early<true>, 160, a, true);
}

}  // namespace mistral::cuda

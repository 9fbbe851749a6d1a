// Warpgroups want more registers than there are.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void too_many_registers(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    registers_decrease<kCorrect ? 128 : 136>();
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  registers_increase<248>();
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) consume(d, stages, tile);
  store(out, d);
}

}  // namespace

cudaError_t run_too_many_registers(const Arguments& a) {
  return run_planted(too_many_registers<false>, too_many_registers<true>, 384, a);
}

}  // namespace mistral::cuda

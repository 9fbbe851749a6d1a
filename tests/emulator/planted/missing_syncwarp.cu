// Lanes read what other lanes wrote to shared memory, without __syncwarp between: a warp is not in
// step by itself.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_syncwarp(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int lane = threadIdx.x, other = lane ^ 1, first = 32 * blockIdx.x;
  shared[lane] = ld_global(in + first + lane);
  if (kCorrect) __syncwarp();
  st_global(out + first + other, 2 * shared[other]);
}

}  // namespace

cudaError_t run_missing_syncwarp(const Arguments& a) {
  return run_planted(missing_syncwarp<false>, missing_syncwarp<true>, 8, 32, 32, a);
}

}  // namespace mistral::cuda

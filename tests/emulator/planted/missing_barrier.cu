// Threads read what other warps wrote to shared memory, without a barrier between.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_barrier(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int i = threadIdx.x, other = kCount - 1 - i;
  shared[i] = ld_global(in + i);
  if (kCorrect) __syncthreads();
  st_global(out + other, 2 * shared[other]);
}

}  // namespace

cudaError_t run_missing_barrier(const Arguments& a) {
  return run_planted(missing_barrier<false>, missing_barrier<true>, 1, 256, 256, a);
}

}  // namespace mistral::cuda

// The two halves of a block wait at barriers of their own.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void divergent_barrier(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int i = threadIdx.x, other = kCount - 1 - i;
  shared[i] = ld_global(in + i);
  if (kCorrect) {
    __syncthreads();
  } else if (i < 128) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  st_global(out + other, 2 * shared[other]);
}

}  // namespace

cudaError_t run_divergent_barrier(const Arguments& a) {
  return run_planted(divergent_barrier<false>, divergent_barrier<true>, 1, 256, 256, a);
}

}  // namespace mistral::cuda

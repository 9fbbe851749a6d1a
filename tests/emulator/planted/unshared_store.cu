// Threads read what others of their block have stored in global memory, without a barrier between.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void unshared_store(const float* in, float* out) {
  const int i = threadIdx.x, other = kCount - 1 - i;
  st_global(out + i, ld_global(in + i));
  if (kCorrect) __syncthreads();
  const float x = ld_global(out + other);
  __syncthreads();
  st_global(out + other, 2 * x);
}

}  // namespace

cudaError_t run_unshared_store(const Arguments& a) {
  return run_planted(unshared_store<false>, unshared_store<true>, 1, kCount, 0, a);
}

}  // namespace mistral::cuda

// Fills a buffer with the next tile while slower warps may still be reading this one.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void reused_too_early(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int thread = threadIdx.x, other = 63 - thread;
  for (int tile = 0; tile < kCount; tile += 64) {
    if (thread < 16) cp_async_16(shared + 4 * thread, in + tile + 4 * thread, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    st_global(out + tile + other, 2 * shared[other]);
    if (kCorrect) __syncthreads();
  }
}

}  // namespace

cudaError_t run_reused_too_early(const Arguments& a) {
  return run_planted(reused_too_early<false>, reused_too_early<true>, 1, 64, 64, a);
}

}  // namespace mistral::cuda

// Threads without work leave before the others come to the barrier.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void exited_thread(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (!kCorrect && i >= kCount) return;
  if (i < kCount) shared[i] = ld_global(in + i);
  __syncthreads();
  if (i < kCount) st_global(out + i, 2 * shared[i]);
}

}  // namespace

cudaError_t run_exited_thread(const Arguments& a) {
  return run_planted(exited_thread<false>, exited_thread<true>, 1, 288, 256, a);
}

}  // namespace mistral::cuda

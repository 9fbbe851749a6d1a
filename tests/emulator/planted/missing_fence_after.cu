// The last block to finish reads what the others have stored, and has not made sure that it sees
// it. (Element 256 of out is the counter of blocks.)
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_fence_after(const float* in, float* out) {
  bool* last = dynamic_shared<bool>();
  const int thread = threadIdx.x, first = 32 * blockIdx.x;
  st_global(out + first + thread, ld_global(in + first + thread));
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    *last = atomicAdd(out + kCount, 1.0f) == 7;
    if (kCorrect) __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  for (int i = thread; i < kCount; i += 32) st_global(out + i, 2 * ld_global(out + i));
}

}  // namespace

cudaError_t run_missing_fence_after(const Arguments& a) {
  return run_planted(missing_fence_after<false>, missing_fence_after<true>, 8, 32, 1, a);
}

}  // namespace mistral::cuda

// Reads what cp.async has been told to bring, without waiting for it.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_wait(const float* in, float* out) {
  auto* shared = dynamic_shared<float>() + 4 * threadIdx.x;
  const int first = 4 * threadIdx.x;
  cp_async_16(shared, in + first, true);
  cp_async_commit();
  if (kCorrect) cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) st_global(out + first + i, 2 * shared[i]);
}

}  // namespace

cudaError_t run_missing_wait(const Arguments& a) {
  return run_planted(missing_wait<false>, missing_wait<true>, 1, 64, 256, a);
}

}  // namespace mistral::cuda

// Writes past the end of shared memory with a plain store.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void past_shared(const float* in, float* out) {
  auto* shared = dynamic_shared<float>() + (kCorrect ? 0 : 1);
  shared[threadIdx.x] = ld_global(in + threadIdx.x);
  st_global(out + threadIdx.x, 2 * shared[threadIdx.x]);
}

}  // namespace

cudaError_t run_past_shared(const Arguments& a) {
  return run_planted(past_shared<false>, past_shared<true>, 1, 256, 256, a);
}

}  // namespace mistral::cuda

// Reads 16 bytes from past the end of shared memory.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void out_of_bounds_shared(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int first = 4 * threadIdx.x;
  st_shared_16(shared + first, ld_global_16(in + first));
  const uint4 v = ld_shared_16(shared + first + (kCorrect || first + 4 < kCount ? 0 : 4));
  const uint32_t bits[] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) st_global(out + first + i, 2 * __uint_as_float(bits[i]));
}

}  // namespace

cudaError_t run_out_of_bounds_shared(const Arguments& a) {
  return run_planted(out_of_bounds_shared<false>, out_of_bounds_shared<true>, 1, 64, 256, a);
}

}  // namespace mistral::cuda

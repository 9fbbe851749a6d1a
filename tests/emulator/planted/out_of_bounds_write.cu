// Writes two elements too many.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void out_of_bounds_write(const float* in, float* out) {
  const int i = threadIdx.x, last = kCorrect ? kCount - 1 : kCount + 1;
  const float value = ld_global(in + i % kCount);
  if (i <= last) st_global(out + i, 2 * value);
}

}  // namespace

cudaError_t run_out_of_bounds_write(const Arguments& a) {
  return run_planted(out_of_bounds_write<false>, out_of_bounds_write<true>, 1, kCount + 2, 0, a);
}

}  // namespace mistral::cuda

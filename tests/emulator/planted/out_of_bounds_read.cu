// The last block is not full, and its idle threads read on.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void out_of_bounds_read(const float* in, float* out) {
  const int i = 96 * blockIdx.x + threadIdx.x;
  if (kCorrect && i >= kCount) return;
  const float value = ld_global(in + i);
  if (i < kCount) st_global(out + i, 2 * value);
}

}  // namespace

cudaError_t run_out_of_bounds_read(const Arguments& a) {
  return run_planted(out_of_bounds_read<false>, out_of_bounds_read<true>, 3, 96, 0, a);
}

}  // namespace mistral::cuda

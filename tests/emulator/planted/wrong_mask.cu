// Lanes take part in a shuffle whose mask does not name them.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_mask(const float* in, float* out) {
  const int lane = threadIdx.x, first = 32 * blockIdx.x;
  const float value = 2 * ld_global(in + first + (lane ^ 1));
  st_global(out + first + lane, __shfl_xor_sync(kCorrect ? 0xffffffff : 0x0000ffff, value, 1));
}

}  // namespace

cudaError_t run_wrong_mask(const Arguments& a) {
  return run_planted(wrong_mask<false>, wrong_mask<true>, 8, 32, 0, a);
}

}  // namespace mistral::cuda

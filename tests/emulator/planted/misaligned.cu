// Loads 16 bytes from an address that is a multiple of 8.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void misaligned(const float* in, float* out) {
  const int first = 4 * threadIdx.x;
  const uint4 v = ld_global_16(in + first + (kCorrect || first == kCount - 4 ? 0 : 2));
  const uint32_t bits[] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) st_global(out + first + i, 2 * __uint_as_float(bits[i]));
}

}  // namespace

cudaError_t run_misaligned(const Arguments& a) {
  return run_planted(misaligned<false>, misaligned<true>, 1, 64, 0, a);
}

}  // namespace mistral::cuda

// Half a warp shuffles with a mask of all lanes, in a branch that the other half does not take.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void divergent_shuffle(const float* in, float* out) {
  const int lane = threadIdx.x, first = 32 * blockIdx.x;
  const unsigned half = kCorrect ? 0x0000ffff : 0xffffffff;
  float value = 2 * ld_global(in + first + (lane < 16 ? lane ^ 1 : lane));
  if (lane < 16) value = __shfl_xor_sync(half, value, 1);
  __syncwarp();
  st_global(out + first + lane, value);
}

}  // namespace

cudaError_t run_divergent_shuffle(const Arguments& a) {
  return run_planted(divergent_shuffle<false>, divergent_shuffle<true>, 8, 32, 0, a);
}

}  // namespace mistral::cuda

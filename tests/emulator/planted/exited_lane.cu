// Lanes without work leave before the others shuffle with a mask of all lanes.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void exited_lane(const float* in, float* out) {
  // 11 blocks of 24 lanes with work, and the last of them has less.
  const int lane = threadIdx.x, i = 24 * blockIdx.x + lane;
  const bool works = lane < 24 && i < kCount;
  if (!kCorrect && !works) return;
  float value = works ? ld_global(in + i) : 0;
  value += __shfl_sync(0xffffffff, value, lane);
  if (works) st_global(out + i, value);
}

}  // namespace

cudaError_t run_exited_lane(const Arguments& a) {
  return run_planted(exited_lane<false>, exited_lane<true>, 11, 32, 0, a);
}

}  // namespace mistral::cuda

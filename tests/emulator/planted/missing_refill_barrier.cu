// Fills a buffer with the next tile while other lanes may still be reading this one: a shuffle
// between is no barrier.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_refill_barrier(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int lane = threadIdx.x, other = 31 - lane;
  for (int tile = 0; tile < kCount; tile += 32) {
    shared[lane] = ld_global(in + tile + lane);
    __syncwarp();
    const float x = shared[other];
    if (kCorrect) __syncwarp();
    st_global(out + tile + other, __shfl_sync(0xffffffff, 2 * x, lane));
  }
}

}  // namespace

cudaError_t run_missing_refill_barrier(const Arguments& a) {
  return run_planted(missing_refill_barrier<false>, missing_refill_barrier<true>, 1, 32, 32, a);
}

}  // namespace mistral::cuda

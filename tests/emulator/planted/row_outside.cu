// Gives ldmatrix a row that lies past the end of shared memory.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void row_outside(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int lane = threadIdx.x, first = 128 * blockIdx.x;
  st_shared_16(shared + 4 * lane, ld_global_16(in + first + 4 * lane));
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, shared + 4 * lane + (kCorrect ? 0 : 4 * (lane / 31)));
  for (int i = 0; i < 4; ++i) {
    st_global(out + first + 32 * i + lane, 2 * __uint_as_float(r[i]));
  }
}

}  // namespace

cudaError_t run_row_outside(const Arguments& a) {
  return run_planted(row_outside<false>, row_outside<true>, 2, 32, 128, a);
}

}  // namespace mistral::cuda

// Gives ldmatrix the right rows by the wrong lanes. (A register is one float here: half a row of
// its matrix has 4 of them.)
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_row(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int lane = threadIdx.x, first = 128 * blockIdx.x;
  st_shared_16(shared + 4 * lane, ld_global_16(in + first + 4 * lane));
  __syncwarp();
  const int row = kCorrect ? lane : lane % 4 * 8 + lane / 4;
  uint32_t r[4];
  ldmatrix_x4(r, shared + 4 * row);
  for (int i = 0; i < 4; ++i) {
    st_global(out + first + 32 * i + lane, 2 * __uint_as_float(r[i]));
  }
}

}  // namespace

cudaError_t run_wrong_row(const Arguments& a) {
  return run_planted(wrong_row<false>, wrong_row<true>, 2, 32, 128, a);
}

}  // namespace mistral::cuda

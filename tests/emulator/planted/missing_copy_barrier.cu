// Has ldmatrix read what cp.async of other lanes has brought, without __syncwarp in between. Each
// lane has waited for its own copies, but ldmatrix is no barrier, although all lanes come to it.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_copy_barrier(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int lane = threadIdx.x, first = 128 * blockIdx.x;
  cp_async_16(shared + 4 * lane, in + first + 4 * lane, true);
  cp_async_commit();
  cp_async_wait<0>();
  if (kCorrect) __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, shared + 4 * lane);
  for (int i = 0; i < 4; ++i) {
    st_global(out + first + 32 * i + lane, 2 * __uint_as_float(r[i]));
  }
}

}  // namespace

cudaError_t run_missing_copy_barrier(const Arguments& a) {
  return run_planted(missing_copy_barrier<false>, missing_copy_barrier<true>, 2, 32, 128, a);
}

}  // namespace mistral::cuda

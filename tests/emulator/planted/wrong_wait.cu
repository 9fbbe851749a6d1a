// Waits for all groups but the last, when it is the last that it reads.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void wrong_wait(const float* in, float* out) {
  auto* shared = dynamic_shared<float>() + 8 * threadIdx.x;
  const int first = 8 * threadIdx.x;
  for (int i = 0; i < 8; i += 4) {
    cp_async_16(shared + i, in + first + i, true);
    cp_async_commit();
  }
  cp_async_wait<kCorrect ? 0 : 1>();
  for (int i = 0; i < 8; ++i) st_global(out + first + i, 2 * shared[i]);
}

}  // namespace

cudaError_t run_wrong_wait(const Arguments& a) {
  return run_planted(wrong_wait<false>, wrong_wait<true>, 1, 32, 256, a);
}

}  // namespace mistral::cuda

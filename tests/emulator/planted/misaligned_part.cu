// Copies the second half of a word with cp.async, 2 bytes of 4: the address has to be a multiple of
// 4 all the same.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void misaligned_part(const float* in, float* out) {
  auto* shared = dynamic_shared<uint16_t>();
  const int i = threadIdx.x;
  const auto* halves = reinterpret_cast<const uint16_t*>(in + i);
  if (kCorrect) {
    cp_async_4(shared + 2 * i, halves, 4);
  } else {
    cp_async_4(shared + 2 * i, halves + 1, 2);
  }
  cp_async_commit();
  cp_async_wait<0>();
  float value;
  memcpy(&value, shared + 2 * i, sizeof value);
  st_global(out + i, 2 * value);
}

}  // namespace

cudaError_t run_misaligned_part(const Arguments& a) {
  return run_planted(misaligned_part<false>, misaligned_part<true>, 1, kCount, kCount, a);
}

}  // namespace mistral::cuda

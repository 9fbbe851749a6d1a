// The input is loaded while the kernel that writes it may still run.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void began_too_early(const float* in, float* out) {
  if (kCorrect) wait_for_earlier_kernels();
  const float x = ld_global(in + threadIdx.x);
  if (!kCorrect) wait_for_earlier_kernels();
  st_global(out + threadIdx.x, 2 * x);
}

}  // namespace

cudaError_t run_began_too_early(const Arguments& a) {
  const auto kernel = a.n == 0 ? began_too_early<false> : began_too_early<true>;
  return launch_overlapping(kernel, dim3(1), dim3(kCount), 0, nullptr,
                            static_cast<const float*>(a.in), static_cast<float*>(a.out));
}

}  // namespace mistral::cuda

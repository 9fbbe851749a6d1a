// The input is read without a function of ptx.cuh while the kernel that writes it may still run.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void looked_up_too_early(const float* in, float* out) {
  if (kCorrect) wait_for_earlier_kernels();
  const float x = in[threadIdx.x];
  if (!kCorrect) wait_for_earlier_kernels();
  st_global(out + threadIdx.x, 2 * x);
}

}  // namespace

cudaError_t run_looked_up_too_early(const Arguments& a) {
  const auto kernel = a.n == 0 ? looked_up_too_early<false> : looked_up_too_early<true>;
  return launch_overlapping(kernel, dim3(1), dim3(kCount), 0, nullptr,
                            static_cast<const float*>(a.in), static_cast<float*>(a.out));
}

}  // namespace mistral::cuda

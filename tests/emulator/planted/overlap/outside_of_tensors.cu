// A kernel reads what the one ahead stores, before it waits for that one. It is a variable of the
// device, which is no tensor, so the emulator does not watch accesses to it.
#include "../planted.h"

namespace mistral::cuda {
namespace {

__device__ float doubled[kCount];

__global__ void make_doubled(const float* in) {
  wait_for_earlier_kernels();
  let_later_kernels_begin();
  doubled[threadIdx.x] = 2 * ld_global(in + threadIdx.x);
}

template <bool kCorrect>
__global__ void outside_of_tensors(float* out) {
  if (kCorrect) wait_for_earlier_kernels();
  const float x = doubled[threadIdx.x];
  if (!kCorrect) wait_for_earlier_kernels();
  st_global(out + threadIdx.x, x);
}

}  // namespace

cudaError_t run_outside_of_tensors(const Arguments& a) {
  const cudaError_t status = launch_overlapping(make_doubled, dim3(1), dim3(kCount), 0, nullptr,
                                                static_cast<const float*>(a.in));
  if (status != cudaSuccess) return status;
  const auto kernel = a.n == 0 ? outside_of_tensors<false> : outside_of_tensors<true>;
  return launch_overlapping(kernel, dim3(1), dim3(kCount), 0, nullptr, static_cast<float*>(a.out));
}

}  // namespace mistral::cuda

// The second of three kernels does not wait for the first. The third waits for the second alone, so
// it may come before the first is done.
#include "planted.h"

namespace mistral::cuda {
namespace {

__global__ void copy(const float* in, float* out) {
  wait_for_earlier_kernels();
  let_later_kernels_begin();
  st_global(out + threadIdx.x, ld_global(in + threadIdx.x));
}

template <bool kCorrect>
__global__ void never_waits() {
  let_later_kernels_begin();
  if (kCorrect) wait_for_earlier_kernels();
}

__global__ void double_in_place(float* out) {
  wait_for_earlier_kernels();
  st_global(out + threadIdx.x, 2 * ld_global(out + threadIdx.x));
}

}  // namespace

cudaError_t run_never_waits(const Arguments& a) {
  auto* const out = static_cast<float*>(a.out);
  const auto start = [](auto kernel, auto... arguments) {
    return launch_overlapping(kernel, dim3(1), dim3(kCount), 0, nullptr, arguments...);
  };
  const cudaError_t first = start(copy, static_cast<const float*>(a.in), out);
  if (first != cudaSuccess) return first;
  const cudaError_t second = start(a.n == 0 ? never_waits<false> : never_waits<true>);
  return second == cudaSuccess ? start(double_in_place, out) : second;
}

}  // namespace mistral::cuda

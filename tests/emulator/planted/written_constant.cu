// A kernel may read what is constant while those before it run; but one of them writes there. (The
// test declares `in` to be constant.)
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void written_constant(const float* in, float* out) {
  const float x = ld_global(in + threadIdx.x);
  wait_for_earlier_kernels();
  if (!kCorrect) st_global(const_cast<float*>(in) + threadIdx.x, x);
  let_later_kernels_begin();
  st_global(out + threadIdx.x, 2 * x);
}

}  // namespace

cudaError_t run_written_constant(const Arguments& a) {
  const auto kernel = a.n == 0 ? written_constant<false> : written_constant<true>;
  const auto* in = static_cast<const float*>(a.in);
  // Twice, one of which writes what the other reads.
  for (int i = 0; i < 2; ++i) {
    const cudaError_t status = launch_overlapping(kernel, dim3(1), dim3(kCount), 0, nullptr, in,
                                                  static_cast<float*>(a.out));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace mistral::cuda

// Grid: the blocks of row 0, then the blocks of row 1, and so on. A thread owns one vector of each
// gradient: 16 bytes, or one element if rows are not aligned.
#include "../swiglu.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const SwigluBackwardParams p, unsigned blocks) {
  const int64_t token = blockIdx.x / blocks;
  const int64_t i = (int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x) * N;
  if (i >= p.dim) return;
  const auto gate = load<N>(static_cast<const T*>(p.gate) + token * p.stride_gate_token + i);
  const auto up = load<N>(static_cast<const T*>(p.up) + token * p.stride_up_token + i);
  const auto d_out = load<N>(static_cast<const T*>(p.d_out) + token * p.stride_d_out_token + i);
  float d_gate[N], d_up[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float sigmoid = 1.0f / (1.0f + expf(-gate[j])), silu = gate[j] * sigmoid;
    d_gate[j] = d_out[j] * up[j] * (sigmoid + silu * (1.0f - sigmoid));
    d_up[j] = d_out[j] * silu;
  }
  store(static_cast<T*>(p.d_gate) + token * p.stride_d_gate_token + i, round_to<T>(d_gate));
  store(static_cast<T*>(p.d_up) + token * p.stride_d_up_token + i, round_to<T>(d_up));
}

template <class T, int N>
cudaError_t launch_rows(const SwigluBackwardParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.dim, kThreads * N));
  return launch(swiglu_backward_kernel<T, N>, dim3(static_cast<unsigned>(p.tokens) * blocks),
                dim3(kThreads), 0, stream, p, blocks);
}

}  // namespace

cudaError_t swiglu_backward(const SwigluBackwardParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    const bool wide = p.dim % kWide == 0 &&
                      fit_vec16<T>({p.gate, p.up, p.d_out, p.d_gate, p.d_up},
                                   {p.stride_gate_token, p.stride_up_token, p.stride_d_out_token,
                                    p.stride_d_gate_token, p.stride_d_up_token});
    return wide ? launch_rows<T, kWide>(p, stream) : launch_rows<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

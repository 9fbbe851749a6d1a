// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer 2020, arXiv:2002.05202).
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"

namespace mistral {

struct SwigluParams {
  DType dtype;
  const void* gate;  // [T, F]
  const void* up;    // [T, F]
  void* out;         // [T, F]
  int64_t tokens;    // T
  int64_t dim;       // F
  int64_t stride_gate_token;
  int64_t stride_up_token;
  int64_t stride_out_token;
};

// The gradients of swiglu. With s = 1 / (1 + exp(-gate)):
//
//   d_gate = d_out * up * s * (1 + gate * (1 - s))
//   d_up   = d_out * gate * s
struct SwigluBackwardParams {
  DType dtype;
  const void* gate;   // [T, F]
  const void* up;     // [T, F]
  const void* d_out;  // [T, F]
  void* d_gate;       // [T, F]
  void* d_up;         // [T, F]
  int64_t tokens;     // T
  int64_t dim;        // F
  int64_t stride_gate_token;
  int64_t stride_up_token;
  int64_t stride_d_out_token;
  int64_t stride_d_gate_token;
  int64_t stride_d_up_token;
};

namespace cpu {
void swiglu(const SwigluParams& p, int threads);
void swiglu_backward(const SwigluBackwardParams& p, int threads);
}  // namespace cpu

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t swiglu(const SwigluParams& p, cudaStream_t stream);
cudaError_t swiglu_backward(const SwigluBackwardParams& p, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace mistral

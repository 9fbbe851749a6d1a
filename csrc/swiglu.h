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

namespace cpu {
void swiglu(const SwigluParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t swiglu(const SwigluParams& p, cudaStream_t stream);
}
#endif

}  // namespace mistral

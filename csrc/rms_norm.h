// RMSNorm with an optional fused residual add (Zhang and Sennrich 2019, arXiv:1910.07467).
//
//   h   = residual + x    rounded to dtype and stored in residual; h = x without a residual
//   out = round(h / sqrt(mean(h^2) + eps)) * weight
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"

namespace mistral {

struct RmsNormParams {
  DType dtype;
  const void* x;       // [T, E]
  const void* weight;  // [E]
  void* residual;      // [T, E], updated in place, or null
  void* out;           // [T, E]
  int64_t tokens;      // T
  int64_t dim;         // E
  int64_t stride_x_token;
  int64_t stride_residual_token;
  int64_t stride_out_token;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream);
}
#endif

}  // namespace mistral

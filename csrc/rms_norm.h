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
  void* residual;      // [T, E], updated in place; null: no residual
  void* out;           // [T, E]
  int64_t tokens;      // T
  int64_t dim;         // E
  int64_t stride_x_token;
  int64_t stride_residual_token;
  int64_t stride_out_token;
  float eps;
};

// The gradient of rms_norm without a residual. Let n = x / sqrt(mean(x^2) + eps) and g = d_out *
// weight. Then:
//
//   d_x = (g - n * mean(g * n)) / sqrt(mean(x^2) + eps)
struct RmsNormBackwardParams {
  DType dtype;
  const void* x;       // [T, E]
  const void* weight;  // [E]
  const void* d_out;   // [T, E]
  void* d_x;           // [T, E]
  int64_t tokens;      // T
  int64_t dim;         // E
  int64_t stride_x_token;
  int64_t stride_d_out_token;
  int64_t stride_d_x_token;
  float eps;
};

namespace cpu {
void rms_norm(const RmsNormParams& p, int threads);
void rms_norm_backward(const RmsNormBackwardParams& p, int threads);
}  // namespace cpu

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream);
cudaError_t rms_norm_backward(const RmsNormBackwardParams& p, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace mistral

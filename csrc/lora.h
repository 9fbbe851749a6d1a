// Low-rank adapters of linear layers (Hu et al. 2021, arXiv:2106.09685). Each token uses one
// adapter, or none.
//
//   hidden = scale * (x A^T)     in fp32
//   out   += hidden B
//
// The matrices A of all adapters are stacked in one tensor, and the matrices B in another. All are
// padded to the largest rank. Layers with the same x, such as query, key and value, are the parts
// of one call. Each part has its own A, B and scale. The outputs of the parts lie side by side.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"

namespace mistral {

// The most parts of a call. A call for query, key and value has this many.
constexpr int64_t kMaxLoraParts = 3;

struct LoraParams {
  DType dtype;              // of x, a and b
  DType out_dtype;          // of out: dtype or f32
  const void* x;            // [T, K]
  const void* a;            // [adapters, parts, max_rank, K], contiguous
  const void* b;            // [adapters, max_rank, N], contiguous
  const float* scales;      // [adapters, parts]
  const int32_t* ranks;     // [adapters, parts], 0 to max_rank; rows of A and B beyond the rank are
                            // not read
  const int32_t* adapters;  // [T], the adapter of each token; negative: no adapter
  float* hidden;            // [T, parts, max_rank], scratch; the gradient of B needs it again
  void* out;                // [T, N], updated in place
  int64_t part_outputs[kMaxLoraParts];  // the number of outputs of each part
  int64_t num_parts;
  int64_t tokens;    // T
  int64_t inputs;    // K
  int64_t outputs;   // N, of all parts
  int64_t max_rank;  // the rank to which A and B are padded
  int64_t stride_x_token;
  int64_t stride_out_token;
};

// The gradient of the stacked A or of the stacked B. For A, x is the input of the layer and
// `hidden` is the gradient of x A^T. For B, x is the gradient of the output of the layer and
// `hidden` is that of LoraParams. Each adapter gets the sum over the tokens that use it:
//
//   out = sum(hidden^T x)
struct LoraGradientParams {
  DType dtype;              // of x
  const float* hidden;      // [T, R]; R: the number of rows of A or B
  const void* x;            // [T, N]
  const int32_t* adapters;  // [T], the adapter of each token; negative: no adapter
  float* out;               // [num_adapters, R, N], contiguous
  int64_t tokens;           // T
  int64_t rank;             // R
  int64_t columns;          // N
  int64_t num_adapters;
  int64_t stride_hidden_token;
  int64_t stride_x_token;
};

namespace cpu {
// The result of a token has the same bits whatever the other tokens and adapters are.
void lora(const LoraParams& p, int threads);
void lora_gradient(const LoraGradientParams& p, int threads);
}  // namespace cpu

#ifdef MISTRAL_CUDA
namespace cuda {
// The result of a token has the same bits whatever the other tokens and adapters are.
cudaError_t lora(const LoraParams& p, cudaStream_t stream);
// Repeated calls give the same bits.
cudaError_t lora_gradient(const LoraGradientParams& p, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace mistral

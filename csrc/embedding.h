// Looks up the embeddings of tokens, which are rows of a matrix in any format (formats.h):
//
//   out = round(weight[token_ids])    scales are applied in fp32, then out is rounded to dtype
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "linear.h"

namespace mistral {

struct EmbeddingParams {
  DType dtype;               // of out, and of a plain weight
  const int64_t* token_ids;  // [T], 0 to V - 1. On CUDA devices any other id gives a row of NaN.
  WeightPart weight;         // [V, E]
  void* out;                 // [T, E], contiguous
  int64_t tokens;            // T
  int64_t dim;               // E
};

namespace cpu {
void embedding(const EmbeddingParams& p, int threads);
}  // namespace cpu

#ifdef MISTRAL_CUDA
namespace cuda {

// If the weight has scales, it must meet the conditions of `dequantize` (linear.h).
cudaError_t embedding(const EmbeddingParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

// The cross entropy of rows of logits, and its gradient if that is wanted. The gradient overwrites
// the logits, so it takes no memory of its own. For each row:
//
//   loss        = log(sum(exp(logits))) - logits[target]
//   gradient[i] = factor * (exp(logits[i]) / sum(exp(logits)) - (i == target ? 1 : 0))
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"

namespace mistral {

struct CrossEntropyParams {
  DType dtype;             // of logits
  void* logits;            // [T, V]; overwritten by the gradient if `factors` is not null
  const int64_t* targets;  // [T], 0 to V - 1
  const float* factors;    // [T], the factor of each row's gradient; null: compute no gradient
  float* loss;             // [T]
  int64_t tokens;          // T
  int64_t vocab;           // V
  int64_t stride_logits_token;
};

namespace cpu {
void cross_entropy(const CrossEntropyParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
// If a target is not in 0 to V - 1, the loss and the gradients of its row are NaN.
cudaError_t cross_entropy(const CrossEntropyParams& p, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace mistral

// out = x weight^T for a few tokens: a product that is limited by reading the weights once.
#pragma once

#include "common.h"

namespace mistral {

struct LinearParams {
  DType dtype;
  const void* x;       // [T, K]
  const void* weight;  // [N, K], contiguous
  void* out;           // [T, N]
  int64_t tokens;      // T
  int64_t inputs;      // K
  int64_t outputs;     // N
  int64_t stride_x_token;
  int64_t stride_out_token;
};

namespace cpu {
void linear(const LinearParams& p, int threads);
}

}  // namespace mistral

// Rotary position embedding for training, in which heads are not stored in a ring. `out` is x
// rotated by the angles of rope.h. The gradient of x is the gradient of `out`, rotated by the
// negated angles.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "ring.h"

namespace mistral {

struct RotateParams {
  DType dtype;
  const void* x;              // [T, H, D]
  void* out;                  // [T, H, D]
  const Sequence* sequences;  // [S]; the fields for the ring are ignored
  const double* frequencies;  // [D/2], radians per position
  int64_t num_sequences;      // S
  int64_t tokens;             // T
  int64_t heads;              // H
  int64_t head_dim;           // D
  int64_t stride_x_token, stride_x_head;
  int64_t stride_out_token, stride_out_head;
  bool backward;  // true: rotate by the negated angles
};

namespace cpu {
void rotate(const RotateParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t rotate(const RotateParams& p, cudaStream_t stream);
}
#endif

}  // namespace mistral

// The kernels of a weight format, for linear.cu, which chooses between formats. Each format has a
// file of its own, gemv_<format>.cu, so that they are compiled at the same time: together they
// take as long as everything else.
#pragma once

#include "../../linear.h"

namespace mistral::cuda {

// `p` has a kernel: linear.cu has looked.
template <WeightFormat kFormat>
struct LinearKernels {
  // True if each block is to normalise x for itself.
  static bool normalises_in_block(const LinearParams& p);

  // Of up to kMaxPassTokens. Without a norm in the block x is multiplied as it is.
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream);
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream,
                            const RopeParams& rope);
};

}  // namespace mistral::cuda

// The kernels of a weight format, for linear.cu, which chooses between formats. Each format has a
// file of its own, gemv_<format>.cu, so that formats compile in parallel: together they take as
// long as everything else.
#pragma once

#include "../../linear.h"

namespace mistral::cuda {

// The caller, linear.cu, has checked that `p` has a kernel.
template <WeightFormat kFormat>
struct LinearKernels {
  // True if each block is to normalise x for itself.
  static bool normalises_in_block(const LinearParams& p);

  // Multiplies up to kMaxPassTokens tokens. x is multiplied as it is unless in_block.
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream);
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream,
                            const RopeParams& rope);
};

}  // namespace mistral::cuda

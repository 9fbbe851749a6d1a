// The kernels of a weight format. linear.cu chooses between formats. The kernels are in several
// files, gemv_*.cu, so that the formats compile in parallel. Together they take as long to compile
// as everything else.
#pragma once

#include "../../linear.h"

namespace mistral::cuda {

// Whether a format has all kernels: for up to 8, 16, 32 and 64 tokens, each with and without RoPE.
// The formats that WeightFormat lists after q8_0 have fewer, because kernels take long to compile:
// for up to 8 and 32 tokens, all without RoPE. A kernel with RoPE would often not serve them. It
// needs one format for query, key and value. Most of these formats are for GGUF files, in which the
// formats of the three often differ.
constexpr bool has_every_kernel(WeightFormat format) { return format <= WeightFormat::q8_0; }

// The most tokens that one pass over weights of a format multiplies.
constexpr int64_t pass_tokens(WeightFormat format) {
  return has_every_kernel(format) ? kMaxPassTokens : 32;
}

// The kernels of one format. The caller, linear.cu, has checked that there is a kernel for `p`.
template <WeightFormat kFormat>
struct LinearKernels {
  // Whether each thread block should normalise x itself (gemv_norm.cuh).
  static bool normalises_in_block(const LinearParams& p);

  // Multiplies up to pass_tokens tokens. If in_block, each thread block first normalises x.
  // Otherwise x is multiplied as it is.
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream);
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream,
                            const RopeParams& rope);  // an error unless has_every_kernel
};

}  // namespace mistral::cuda

// The kernels of a weight format. linear.cu chooses between formats. The kernels are in several
// files, gemv_*.cu, so that formats compile in parallel: compiling all of them takes as long as
// compiling everything else.
#pragma once

#include "../../linear.h"

namespace mistral::cuda {

// Whether a format has a kernel for every number of tokens, and for RoPE. The formats after q8_0,
// which occur in GGUF, GPTQ and AWQ files, have fewer kernels, because kernels take long to
// compile. They have none for RoPE: such a kernel needs one format for query, key and value, and
// GGUF files often mix formats there.
constexpr bool has_every_kernel(WeightFormat format) { return format <= WeightFormat::q8_0; }

// The most tokens of one pass over weights of a format.
constexpr int64_t pass_tokens(WeightFormat format) {
  return has_every_kernel(format) ? kMaxPassTokens : 32;
}

// The kernels of one format. The caller, linear.cu, has checked that there is a kernel for `p`.
template <WeightFormat kFormat>
struct LinearKernels {
  // Whether each block should normalise x itself.
  static bool normalises_in_block(const LinearParams& p);

  // Multiplies up to pass_tokens tokens. If in_block, each block first normalises x. Otherwise x is
  // multiplied as it is.
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream);
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream,
                            const RopeParams& rope);  // needs has_every_kernel
};

}  // namespace mistral::cuda

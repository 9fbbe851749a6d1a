// The kernels of a weight format. linear.cu chooses between formats. The kernels are in several
// files, gemv_*.cu, so that formats compile in parallel: together they take as long to compile as
// everything else.
#pragma once

#include "../../linear.h"

namespace mistral::cuda {

// Whether a format has a kernel for every number of tokens and for RoPE. The formats after q8_0,
// which GGUF, GPTQ and AWQ files have, get fewer kernels, because kernels take long to compile.
// They get none for RoPE: it would need one format for query, key and value, and GGUF files mix
// formats there.
constexpr bool has_every_kernel(WeightFormat format) { return format <= WeightFormat::q8_0; }

// The most tokens of one pass over weights of a format.
constexpr int64_t pass_tokens(WeightFormat format) {
  return has_every_kernel(format) ? kMaxPassTokens : 32;
}

// The caller, linear.cu, has checked that `p` has a kernel.
template <WeightFormat kFormat>
struct LinearKernels {
  // True if each block is to normalise x for itself.
  static bool normalises_in_block(const LinearParams& p);

  // Multiplies up to pass_tokens tokens. Each block normalises x first if in_block; otherwise x is
  // multiplied as it is.
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream);
  static cudaError_t launch(const LinearParams& p, bool in_block, cudaStream_t stream,
                            const RopeParams& rope);  // if has_every_kernel
};

}  // namespace mistral::cuda

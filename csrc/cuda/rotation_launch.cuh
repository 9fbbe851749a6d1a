// The launch that rope and rotate share.
#pragma once

#include <launch.cuh>

namespace mistral::cuda {

constexpr int kRotationThreads = 256;

// Launches one block per token, with shared memory for the cosine and sine of D/2 angles.
template <class Params>
cudaError_t launch_tokens(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  return launch(kernel, dim3(static_cast<unsigned>(p.tokens)), dim3(kRotationThreads),
                static_cast<size_t>(p.head_dim / 2) * sizeof(float2), stream, p);
}

}  // namespace mistral::cuda

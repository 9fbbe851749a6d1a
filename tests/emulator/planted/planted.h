// What the planted bugs share. Each file has one kernel that is to double float [256] and does so
// only with kCorrect: the twin shows that the emulator objects to the bug and to nothing else.
#pragma once

#include <launch.cuh>
#include <ptx.cuh>

#include "../test_kernels.h"

namespace mistral::cuda {

constexpr int kCount = 256;

using Planted = void (*)(const float* in, float* out);

inline cudaError_t run_planted(Planted wrong, Planted correct, unsigned blocks, unsigned threads,
                               size_t shared_floats, const Arguments& a) {
  return launch(a.n ? correct : wrong, dim3(blocks), dim3(threads), shared_floats * sizeof(float),
                nullptr, static_cast<const float*>(a.in), static_cast<float*>(a.out));
}

}  // namespace mistral::cuda

// Stand-in for csrc/cuda/launch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "../run.h"
#include "builtins.h"

namespace mistral::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments... arguments) {
  return emulator::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                       [=] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  return emulator::run(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [=] { kernel(arguments...); }, true);
}

inline int multiprocessors() { return emulator::settings().multiprocessors; }

inline int compute_capability() { return emulator::settings().capability; }

struct SharedMemorySize {
  int of_block = emulator::max_shared_bytes();
  int of_multiprocessor = emulator::max_shared_bytes() + 1024;
};
inline SharedMemorySize shared_memory_size() { return {}; }

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory());
}

}  // namespace mistral::cuda

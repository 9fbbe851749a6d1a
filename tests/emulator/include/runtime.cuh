// Stand-in for csrc/cuda/common/runtime.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "../run.h"
#include "../runtime.h"
#include "builtins.h"

namespace mistral::cuda {

template <class... Parameters, class... Arguments>
cudaError_t start(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments... arguments) {
  return emulator::start(config, reinterpret_cast<const void*>(kernel),
                         [=] { kernel(arguments...); });
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory());
}

}  // namespace mistral::cuda

// Launches kernels and gives them shared memory, for which a CUDA compiler and a device are needed.
//
// This file and ptx.cuh are included in angle brackets, so that the emulator (tests/emulator) can
// replace them. It compiles kernels with the host compiler, and its headers of these names come
// earlier on the include path. The emulator defines the other functions of the runtime that the
// host side of the kernels calls.
#pragma once

#include <cuda_runtime.h>

namespace mistral::cuda {

template <class... Parameters, class... Arguments>
cudaError_t start(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments... arguments) {
  return ::cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The block's shared memory: the `shared_bytes` of its launch. Kernels use no static arrays,
// because the emulator could neither poison them nor check their bounds. The memory is aligned to
// the unit of the 128-byte swizzle of TMA and wgmma.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

}  // namespace mistral::cuda

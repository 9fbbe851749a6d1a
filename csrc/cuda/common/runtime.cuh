// Launches kernels and gives them shared memory, with a CUDA compiler and a device.
//
// This file, ptx.cuh and ptx_sm90.cuh are included in angle brackets, so that the emulator
// (tests/emulator) can replace them. The emulator compiles kernels with the host compiler, and puts
// its own headers of these names earlier on the include path. It also defines the other functions
// of the CUDA runtime that the host side of the kernels calls.
#pragma once

#include <cuda_runtime.h>

namespace mistral::cuda {

template <class... Parameters, class... Arguments>
cudaError_t start(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments... arguments) {
  return ::cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The shared memory of the block, as large as the `shared_bytes` of its launch. Kernels declare no
// static shared arrays, because the emulator could neither fill them with NaN before a block begins
// nor check their bounds. The memory is aligned to 1024 bytes, as the 128-byte swizzle of TMA and
// wgmma needs.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

}  // namespace mistral::cuda

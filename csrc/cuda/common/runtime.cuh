// The launch of a kernel and its shared memory, which need a CUDA compiler and a device.
//
// It is included in angle brackets, as ptx.cuh is: the emulator (tests/emulator) compiles kernels
// with the host compiler and has headers of these names earlier on its include path. The emulator
// defines the other functions of the runtime that the host side of the kernels calls.
#pragma once

#include <cuda_runtime.h>

namespace mistral::cuda {

template <class... Parameters, class... Arguments>
cudaError_t start(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                  Arguments... arguments) {
  return ::cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The block's shared memory, `shared_bytes` of the launch. Kernels have no other: a static array
// could be neither poisoned nor bounds-checked by the emulator. It is aligned to the unit of the
// 128-byte swizzle of TMA and wgmma.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

}  // namespace mistral::cuda

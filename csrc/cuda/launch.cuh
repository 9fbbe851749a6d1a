// How kernels are launched and where they get shared memory.
//
// Kernel files include this header and ptx.cuh in angle brackets: the emulator
// (tests/emulator) compiles the same files with the host compiler and has headers of these two
// names earlier on its include path.
#pragma once

#include <cuda_runtime.h>

namespace mistral::cuda {

// Launches `kernel` on the current device and returns what went wrong with the launch itself.
// Allocates nothing and waits for nothing, so a stream that is being captured may be used. An
// empty grid is no work and no error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Multiprocessors of the current device. Not cached: the runtime answers from a table of its own.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count;
}

// Of the current device: 90 for 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  return 10 * major + minor;
}

// Bytes of shared memory, with those that the runtime keeps for itself.
struct SharedMemorySize {
  int of_block = 48 * 1024;  // the most that one can have
  int of_multiprocessor = 48 * 1024;
};
inline SharedMemorySize shared_memory_size() {
  int device = 0;
  SharedMemorySize size;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&size.of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&size.of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                           device);
  }
  return size;
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

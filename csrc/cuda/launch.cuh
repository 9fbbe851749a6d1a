// How kernels are launched and where they get shared memory.
//
// Kernel files include this header and ptx.cuh in angle brackets: the emulator
// (tests/emulator) compiles the same files with the host compiler and has headers of these two
// names earlier on its include path.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

namespace mistral::cuda {

// More than 48 KB of shared memory have to be asked for.
inline cudaError_t allow_shared(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// Launches `kernel` on the current device and returns what went wrong with the launch itself.
// Allocates nothing and waits for nothing, so a stream that is being captured may be used. An
// empty grid is no work and no error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (status != cudaSuccess) return status;
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

// Whether the kernel's code has the instruction behind wait_for_earlier_kernels: code for older
// devices, which newer ones run too, does not wait.
inline bool waits(const void* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// The same for a kernel that may begin before those ahead of it on the stream are done, where that
// is asked for (device.h) and its code is for devices that can do it: programmatic dependent
// launch. All its threads call wait_for_earlier_kernels (ptx.cuh), and touch nothing before that
// but what the kernel just ahead does not write, such as weights.
template <class... Parameters, class... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  if (!overlapping() || !waits(reinterpret_cast<const void*>(kernel))) {
    return launch(kernel, grid, block, shared_bytes, stream, arguments...);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const cudaError_t status = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
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

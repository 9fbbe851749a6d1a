// How kernels are launched, and what of the device decides how.
#pragma once

#include <runtime.cuh>

#include "../selection.h"
#include "status.h"

namespace mistral::cuda {

// An attribute of the current device.
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  int device = 0;
  const cudaError_t status = checked(cudaGetDevice(&device));
  if (status != cudaSuccess) return status;
  return checked(cudaDeviceGetAttribute(value, attribute, device));
}

// More than 48 KB of shared memory have to be asked for. What is asked for is the kernel's limit
// from then on, so it is always all that a block can have: with less, a launch of another thread
// could lower the limit between this call and the launch that it is for.
inline cudaError_t allow_shared(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  int most = 0;
  const cudaError_t status = device_attribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status != cudaSuccess) return status;
  return checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Launches `kernel` on the current device and returns what went wrong with the launch itself.
// Allocates nothing and waits for nothing, so a stream that is being captured may be used. An
// empty grid is no work and no error.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
                   Arguments... arguments) {
  const dim3 grid = config.gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const cudaError_t status =
      allow_shared(reinterpret_cast<const void*>(kernel), config.dynamicSmemBytes);
  if (status != cudaSuccess) return status;
  return checked(start(config, kernel, arguments...));
}

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, size_t shared_bytes,
                                        cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  return launch(kernel, launch_config(grid, block, shared_bytes, stream), arguments...);
}

// Whether the kernel's code has the instruction behind wait_for_earlier_kernels: code for older
// devices, which newer ones run too, does not wait.
inline bool waits(const void* kernel) {
  cudaFuncAttributes attributes{};
  return checked(cudaFuncGetAttributes(&attributes, kernel)) == cudaSuccess &&
         attributes.ptxVersion >= 90;
}

// The same for a kernel that may begin before those ahead of it on the stream are done, where that
// is asked for (device.h) and its code is for devices that can do it: programmatic dependent
// launch. All its threads call wait_for_earlier_kernels (ptx.cuh), and touch nothing before that
// but what the kernel just ahead does not write, such as weights.
template <class... Parameters, class... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = launch_config(grid, block, shared_bytes, stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (overlapping() && waits(reinterpret_cast<const void*>(kernel))) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return launch(kernel, config, arguments...);
}

// Multiprocessors of the current device. Not cached: the runtime answers from a table of its own.
inline int multiprocessors() {
  int count = 1;
  device_attribute(&count, cudaDevAttrMultiProcessorCount);
  return count;
}

// Bytes of shared memory, with those that the runtime keeps for itself.
struct SharedMemorySize {
  int of_block = 48 * 1024;  // the most that one can have
  int of_multiprocessor = 48 * 1024;
};
inline SharedMemorySize shared_memory_size() {
  SharedMemorySize size;
  device_attribute(&size.of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device_attribute(&size.of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return size;
}

}  // namespace mistral::cuda

// Launches kernels, and reads the properties of a device on which a launch depends.
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

// Raises the limit of a kernel's shared memory if it needs more than the initial 48 KB. The new
// limit is the most that a block can have, not `shared_bytes`. Otherwise another host thread that
// launches the kernel with less shared memory could lower the limit between this call and the
// launch.
inline cudaError_t allow_shared(const void* kernel, size_t shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  int most = 0;
  const cudaError_t status = device_attribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status != cudaSuccess) return status;
  return checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Launches `kernel` on the current device. Returns the status of the launch, which does not tell
// whether the kernel fails later while it runs. Allocates nothing and waits for nothing, so it also
// works on a stream that is captured into a CUDA graph. Does nothing if the grid is empty.
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

// Whether the code that this device would run for the kernel contains the wait of
// wait_for_earlier_kernels (ptx.cuh). Code compiled for capabilities below 9.0 does not contain it,
// and a newer device may run such code.
inline bool waits(const void* kernel) {
  cudaFuncAttributes attributes{};
  return checked(cudaFuncGetAttributes(&attributes, kernel)) == cudaSuccess &&
         attributes.ptxVersion >= 90;
}

// Launches a kernel. If overlap is wanted (selection.h) and the kernel's code supports it, the
// kernel may begin before the earlier kernels of the stream are done (programmatic dependent
// launch). So all its threads must call wait_for_earlier_kernels (ptx.cuh). Before that call, they
// must not write to global memory, and must read there only what no earlier kernel writes, such as
// weights.
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

// The number of multiprocessors of the current device, or 1 if the runtime reports an error. It is
// not cached here, because the runtime itself caches it.
inline int multiprocessors() {
  int count = 1;
  device_attribute(&count, cudaDevAttrMultiProcessorCount);
  return count;
}

// The sizes of shared memory on the current device, in bytes. They remain 48 KB if the runtime
// reports an error. `of_multiprocessor` includes the bytes that the runtime takes for itself in
// each block.
struct SharedMemorySize {
  int of_block = 48 * 1024;  // the most that a block can have
  int of_multiprocessor = 48 * 1024;
};
inline SharedMemorySize shared_memory_size() {
  SharedMemorySize size;
  device_attribute(&size.of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device_attribute(&size.of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return size;
}

}  // namespace mistral::cuda

#include "device.h"

#include <cuda_runtime.h>

namespace mistral::cuda {

Devices devices() {
  Devices found;
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int i = 0; i < count && status == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, i);
    if (status == cudaSuccess) {
      found.list.push_back({properties.name, properties.major, properties.minor,
                            properties.multiProcessorCount, properties.totalGlobalMem});
    }
  }
  if (status != cudaSuccess) found.problem = cudaGetErrorString(status);
  return found;
}

}  // namespace mistral::cuda

#include "device.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>

#include "../selection.h"
#include "status.h"

namespace mistral::cuda {
namespace {

bool& wants_overlap() {
  static bool wanted = [] {
    const char* value = std::getenv("MISTRAL_EXT_OVERLAP");
    const std::string given = value ? value : "";
    if (given.empty() || given == "0" || given == "1") return given == "1";
    throw std::invalid_argument("environment variable MISTRAL_EXT_OVERLAP is '" + given +
                                "', expected 0 or 1");
  }();
  return wanted;
}

}  // namespace

bool overlapping() { return wants_overlap(); }
void overlap(bool wanted) { wants_overlap() = wanted; }

Devices devices() {
  Devices found;
  int count = 0;
  cudaError_t status = checked(cudaGetDeviceCount(&count));
  for (int i = 0; i < count && status == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    status = checked(cudaGetDeviceProperties(&properties, i));
    if (status == cudaSuccess) {
      found.list.push_back({properties.name, properties.major, properties.minor,
                            properties.multiProcessorCount, properties.totalGlobalMem});
    }
  }
  if (status != cudaSuccess) found.problem = describe(status);
  return found;
}

}  // namespace mistral::cuda

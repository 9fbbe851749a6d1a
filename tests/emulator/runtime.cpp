#include "runtime.h"

#include <map>
#include <mutex>
#include <utility>

#include "../../csrc/cuda/common/device.h"
#include "../../csrc/cuda/selection.h"
#include "error.h"
#include "run.h"
#include "symbols.h"

namespace emulator {
namespace {

constexpr size_t kDefaultShared = 48 * 1024;

thread_local cudaError_t last_error = cudaSuccess;

struct State {
  std::mutex mutex;  // of the two below it
  std::map<std::string, cudaError_t> failing;
  std::map<std::pair<const void*, int>, size_t> shared_limits;  // of kernels on a device
};
State& state() {
  static State instance;
  return instance;
}

cudaError_t keep(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

// The status of a call without an error of its own.
cudaError_t outcome(const std::string& function) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().failing.find(function);
  return keep(found == state().failing.end() ? cudaSuccess : found->second);
}

}  // namespace

size_t shared_limit(const void* kernel) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().shared_limits.find({kernel, settings().capability});
  return found == state().shared_limits.end() ? kDefaultShared : found->second;
}

void make_fail(const std::string& function, cudaError_t status) {
  const std::lock_guard lock(state().mutex);
  state().failing[function] = status;
}

cudaError_t start(const cudaLaunchConfig_t& config, const void* kernel,
                  std::function<void()> body) {
  const cudaError_t status = outcome("cudaLaunchKernelEx");
  if (status != cudaSuccess) return status;
  return keep(run(kernel, config.gridDim, config.blockDim, config.dynamicSmemBytes, std::move(body),
                  config.numAttrs > 0));
}

}  // namespace emulator

namespace mistral::cuda {

// Kernels that can overlap do, so that accesses that come too early are found.
bool overlapping() { return true; }

}  // namespace mistral::cuda

using namespace emulator;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  static thread_local std::string name;
  name = "cudaError" + std::to_string(error);
  return name.c_str();
}

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string description;
  description = std::string("description of ") + cudaGetErrorName(error);
  return description.c_str();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12020;
  return outcome("cudaDriverGetVersion");
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return outcome("cudaRuntimeGetVersion");
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return outcome("cudaGetDevice");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cudaError_t status = outcome("cudaDeviceGetAttribute");
  if (status != cudaSuccess) return status;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = settings().multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = settings().capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = settings().capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = max_shared_bytes(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = max_shared_bytes() + 1024; break;
    default: return keep(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// The code of all kernels is for sm_90, whatever the device, so that all can overlap.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return outcome("cudaFuncGetAttributes");
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const cudaError_t status = outcome("cudaFuncSetAttribute");
  if (status != cudaSuccess) return status;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > max_shared_bytes()) {
    return keep(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(state().mutex);
  const auto wanted = static_cast<size_t>(value);
  const std::pair where{kernel, settings().capability};
  size_t& limit = state().shared_limits.try_emplace(where, wanted).first->second;
  if (wanted < limit) {
    throw Error(kernel_name(kernel) + ": its limit of shared memory is lowered from " +
                std::to_string(limit) + " to " + std::to_string(wanted) +
                " bytes, which may be too few for a launch of another thread");
  }
  limit = wanted;
  return cudaSuccess;
}

// Errors of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace mistral::cuda {

// Returns the status of a runtime call. If the call failed, this also clears the error, which the
// runtime keeps for cudaGetLastError. Otherwise other code that calls cudaGetLastError, such as
// torch after a launch, would take the error for its own. So each call that may fail goes through
// here.
inline cudaError_t checked(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Describes an error in the words of the runtime. Adds the versions of runtime and driver, because
// a mismatch of the two is a common cause.
inline std::string describe(cudaError_t status) {
  const auto version = [](cudaError_t (*get)(int*)) {
    int number = 0;  // 13000 for version 13.0; 0 if there is no driver
    if (checked(get(&number)) != cudaSuccess || number == 0) return std::string("none");
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status) +
         " (CUDA version of the driver: " + version(&cudaDriverGetVersion) +
         ", of mistral_ext's runtime: " + version(&cudaRuntimeGetVersion) + ")";
}

}  // namespace mistral::cuda

// Errors of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace mistral::cuda {

// What a call of the runtime returned. The runtime also keeps the error of a call that failed, for
// cudaGetLastError: whoever asks next, torch after a launch of its own for instance, would take it
// for an error of theirs. So each call that may fail goes through here, which takes it back.
inline cudaError_t checked(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// In the runtime's words, with the two versions that many an error comes from.
inline std::string describe(cudaError_t status) {
  const auto version = [](cudaError_t (*get)(int*)) {
    int number = 0;  // 13000 for 13.0; a driver that is not there has 0
    if (checked(get(&number)) != cudaSuccess || number == 0) return std::string("none");
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status) +
         " (CUDA version of the driver: " + version(&cudaDriverGetVersion) +
         ", of mistral_ext's runtime: " + version(&cudaRuntimeGetVersion) + ")";
}

}  // namespace mistral::cuda

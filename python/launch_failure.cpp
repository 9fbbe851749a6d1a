// Turns a failed launch into a Python exception.
#include <stdexcept>

#include "device.h"

namespace mistral::python {

#ifdef MISTRAL_CUDA

void fail_launch(const char* op, int index, cudaError_t status) {
  const auto attribute = [&](int* value, cudaDeviceAttr name) {
    return cuda::checked(cudaDeviceGetAttribute(value, name, index)) == cudaSuccess;
  };
  int major = 0, minor = 0;
  if (attribute(&major, cudaDevAttrComputeCapabilityMajor) &&
      attribute(&minor, cudaDevAttrComputeCapabilityMinor) && major < 8) {
    fail(op, "cuda:" + std::to_string(index) + " has compute capability " + std::to_string(major) +
                 "." + std::to_string(minor) + ", expected 8.0 or more");
  }
  throw std::runtime_error(std::string(op) + ": the launch failed: " + cuda::describe(status));
}

#endif

}  // namespace mistral::python

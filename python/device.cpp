#include "device.h"

namespace mistral::python {

#ifdef MISTRAL_CUDA

void expect_supported_device(const char* op, int index) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (major < 8) {
    fail(op, "cuda:" + std::to_string(index) + " has compute capability " + std::to_string(major) +
                 "." + std::to_string(minor) + ", expected 8.0 or more");
  }
}

#endif

}  // namespace mistral::python

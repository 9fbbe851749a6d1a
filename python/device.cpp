#include "device.h"

namespace mistral::python {

#ifdef MISTRAL_CUDA

uint64_t capture_id(Lane lane) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(lane), &status, &id);
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

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

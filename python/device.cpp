#include "device.h"

namespace mistral::python {

#ifdef MISTRAL_CUDA

uint64_t capture_id(ExecutionTarget target) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cuda::checked(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(target), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

#endif

}  // namespace mistral::python

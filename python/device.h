// Runs an op's kernel on the device of its tensors.
#pragma once

#include <optional>
#include <string>

#include "tensor.h"
#ifdef MISTRAL_CUDA
#include "../csrc/cuda/common/status.h"
#endif

namespace mistral::python {

// The kernels of an op, as the last arguments of `run`.
#ifdef MISTRAL_CUDA
#define MISTRAL_KERNELS(op) &cpu::op, &cuda::op
#else
#define MISTRAL_KERNELS(op) &cpu::op
#endif

// Says where a call runs. On a CPU this is the number of threads, on a CUDA device the handle of a
// stream.
using ExecutionTarget = int64_t;

// Lets other threads run Python as long as this object lives. It does nothing if the thread already
// has another WithoutGil.
class WithoutGil {
 public:
  WithoutGil() {
    if (depth_++ == 0) released_.emplace();
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() { --depth_; }

 private:
  // Counts the living objects of this thread. Python cannot be asked instead: with subinterpreters
  // it always says that the GIL is held.
  static inline thread_local int depth_ = 0;
  std::optional<py::gil_scoped_release> released_;
};

#ifdef MISTRAL_CUDA

// Makes a device the current device as long as this object lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    status_ = cuda::checked(cudaGetDevice(&before_));
    if (status_ != cudaSuccess || index == before_) return;
    status_ = cuda::checked(cudaSetDevice(index));
    changed_ = status_ == cudaSuccess;
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_) cuda::checked(cudaSetDevice(before_));
  }

  // cudaSuccess if the device is current, else the error.
  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_;
  int before_ = 0;
  bool changed_ = false;
};

// The id of the CUDA graph into which a stream is being captured, or 0 if it is not being captured.
// No two graphs share an id. Graphs may run at the same time, so the caller gives each graph its
// own counters (Call::counters).
uint64_t capture_id(ExecutionTarget target);

// Reports a failed launch on CUDA device `index`. Throws ValueError if the device is too old for
// the kernels, otherwise RuntimeError with the message of the CUDA runtime.
[[noreturn]] void fail_launch(const char* op, int index, cudaError_t status);

template <class Params>
void run(const Tensor& x, ExecutionTarget target, const Params& p, void (*cpu)(const Params&, int),
         cudaError_t (*cuda)(const Params&, cudaStream_t)) {
  if (!x.is_cuda()) {
    const WithoutGil without_gil;
    return cpu(p, static_cast<int>(target));
  }
  cudaError_t status;
  {
    const WithoutGil without_gil;
    const CurrentDevice device(x.device_index());
    status = device.status();
    if (status == cudaSuccess) status = cuda(p, reinterpret_cast<cudaStream_t>(target));
  }
  if (status != cudaSuccess) fail_launch(x.op(), x.device_index(), status);
}

#else

template <class Params>
void run(const Tensor& x, ExecutionTarget target, const Params& p,
         void (*cpu)(const Params&, int)) {
  if (x.is_cuda()) {
    fail(x.op(),
         "tensors are on a CUDA device, expected cpu: this build of mistral_ext has no CUDA "
         "kernels. Install it again with nvcc on PATH and MISTRAL_EXT_CUDA=on");
  }
  const WithoutGil without_gil;
  cpu(p, static_cast<int>(target));
}

#endif

// Throws ValueError if x is on a CUDA device. Ops that have only CPU kernels call this.
inline void expect_cpu(const Tensor& x) {
  if (x.is_cuda()) fail(x.op(), "tensors are on a CUDA device, expected cpu");
}

template <class Params>
void run_on_cpu(ExecutionTarget target, const Params& p, void (*cpu)(const Params&, int)) {
  const WithoutGil without_gil;
  cpu(p, static_cast<int>(target));
}

}  // namespace mistral::python

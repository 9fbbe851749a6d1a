// A call of an op that needs scratch memory. Its arguments are checked, but its kernel is not
// started. Python asks how much memory the call needs, then runs it with that memory.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "device.h"

namespace mistral::python {

class Call {
 public:
  // Starts the kernel. workspace: the address of workspace_bytes bytes, a multiple of 64. counters:
  // the address of `counters` ints.
  using Start = std::function<void(void* workspace, int32_t* counters, ExecutionTarget target)>;

  // Holds the addresses of the tensors but does not own them: they must outlive the call.
  Call(int64_t workspace_bytes, int64_t counters, Start start)
      : workspace_bytes(workspace_bytes), counters(counters), start_(std::move(start)) {}

  const int64_t workspace_bytes;  // on the device of the tensors
  const int64_t counters;         // ints on a CUDA device, zero before and after; 0 on the CPU

  void run(uintptr_t workspace_address, uintptr_t counters_address, ExecutionTarget target) const {
    start_(reinterpret_cast<void*>(workspace_address), reinterpret_cast<int32_t*>(counters_address),
           target);
  }

 private:
  Start start_;
};

}  // namespace mistral::python

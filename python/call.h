// A call of an op that needs memory to work in: its arguments are checked, its kernel is not
// started yet. Python asks how much memory it needs, and runs it with that much.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

#include "device.h"

namespace mistral::python {

class Call {
 public:
  // Starts the kernel. workspace: the address of that many bytes, a multiple of 64. counters: that
  // of so many ints.
  using Start = std::function<void(void* workspace, int32_t* counters, ExecutionTarget target)>;

  // Knows the addresses of the tensors but does not own them: they have to outlive it.
  Call(int64_t workspace_bytes, int64_t counters, Start start)
      : workspace_bytes(workspace_bytes), counters(counters), start_(std::move(start)) {}

  const int64_t workspace_bytes;  // on the device of the tensors
  const int64_t counters;         // zeros on a CUDA device, left zeros; on the CPU there are none

  void run(uintptr_t workspace_address, uintptr_t counters_address, ExecutionTarget target) const {
    start_(reinterpret_cast<void*>(workspace_address), reinterpret_cast<int32_t*>(counters_address),
           target);
  }

 private:
  Start start_;
};

}  // namespace mistral::python

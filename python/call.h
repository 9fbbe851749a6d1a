// A call of an op that may need scratch memory. Its arguments have been checked, but its kernel has
// not been started. Python asks how much memory the call needs, then runs it with that memory. On
// the CPU a call can be run again. The kernel then reads the values that its tensors hold at that
// time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "device.h"

namespace mistral::python {

class Call {
 public:
  // Starts the kernel. `workspace` points to workspace_bytes bytes, 64-byte aligned. `counters`
  // points to as many ints as Call::counters says, which are zero before and after the call.
  using Start = std::function<void(void* workspace, int32_t* counters, ExecutionTarget target)>;

  // Checks the current values on which the kernel relies, such as those of the sequence table.
  // Throws if they are wrong. Returns the number of bytes of workspace that the call needs with
  // these values.
  using Recheck = std::function<int64_t()>;

  // A call holds the addresses of its tensors but does not own the tensors, so they must outlive
  // the call. `recheck` is null if the kernel takes any values, or if no Recording gets the call.
  Call(int64_t workspace_bytes, int64_t counters, Start start, Recheck recheck = nullptr)
      : workspace_bytes(workspace_bytes),
        counters(counters),
        start_(std::move(start)),
        recheck_(std::move(recheck)) {}

  const int64_t workspace_bytes;  // the size of the scratch memory, on the device of the tensors
  // The number of ints by which the blocks of a CUDA kernel know what other blocks have done. It is
  // 0 on the CPU.
  const int64_t counters;

  void run(uintptr_t workspace_address, uintptr_t counters_address, ExecutionTarget target) const {
    start_(reinterpret_cast<void*>(workspace_address), reinterpret_cast<int32_t*>(counters_address),
           target);
  }

  int64_t recheck() const { return recheck_ ? recheck_() : workspace_bytes; }

 private:
  Start start_;
  Recheck recheck_;
};

// A list of calls on the CPU that can be run any number of times, one after another, without Python
// between them. In a small model Python takes as long per call as a kernel, so the engine records a
// decode step and repeats it. Only one thread at a time may run the calls, because all runs write
// to the same tensors.
class Recording {
 public:
  void add(const Call& call) { calls_.push_back(call); }

  // Rechecks all calls. Returns the number of bytes of the largest workspace that a call needs.
  int64_t recheck() const {
    int64_t most = 0;
    for (const Call& call : calls_) most = std::max(most, call.recheck());
    return most;
  }

  void run(uintptr_t workspace_address, ExecutionTarget threads) const {
    const WithoutGil without_gil;  // here, so that the GIL is released once and not in each call
    for (const Call& call : calls_) call.run(workspace_address, 0, threads);
  }

 private:
  std::vector<Call> calls_;
};

}  // namespace mistral::python

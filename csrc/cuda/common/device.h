// The CUDA devices of this machine, for `mistral-ext info`.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace mistral::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory_bytes;
};

struct Devices {
  std::vector<Device> list;
  std::string problem;  // the runtime's error if the list is empty or incomplete; else empty
};

// Does not throw if the runtime reports an error. On a machine without a driver, for example, the
// list is empty and `problem` says why.
Devices devices();

}  // namespace mistral::cuda

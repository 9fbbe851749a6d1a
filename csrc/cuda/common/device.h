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

// Works on a machine without a driver too: the missing driver is then the `problem`, not an error.
Devices devices();

}  // namespace mistral::cuda

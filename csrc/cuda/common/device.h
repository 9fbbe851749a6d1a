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
  std::string problem;  // why there are none, in the runtime's words; empty if there are some
};

// Works on a machine without a driver: that is a problem to report, not an error.
Devices devices();

// Whether the kernels of a decode step may overlap: each then fetches its first weights while the
// one before it ends, so that weights must not be what that one computes. Set by the environment
// variable MISTRAL_EXT_OVERLAP, 0 or 1, or by `overlap`.
bool overlapping();
void overlap(bool wanted);

}  // namespace mistral::cuda

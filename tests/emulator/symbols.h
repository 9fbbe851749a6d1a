// Names of kernels from their addresses.
#pragma once

#include <string>

namespace emulator {

// "mistral::cuda::rms_norm_kernel<float, 4>" without what surrounds a name in C++: its return type,
// parameters and unnamed namespaces.
std::string kernel_name(const void* function);

}  // namespace emulator

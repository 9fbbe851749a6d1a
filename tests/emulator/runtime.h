// Stand-ins for the functions of the CUDA runtime that the host side of the kernels calls.
//
// As in the real one, each thread keeps the error of its last call that failed until it asks for
// it, and a kernel may be launched with more than 48 KB of shared memory only if that is its limit.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

namespace emulator {

// cudaLaunchKernelEx.
cudaError_t start(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

// Bytes that the kernel may be launched with, which cudaFuncSetAttribute sets.
size_t shared_limit(const void* kernel);

// From now on this function of the runtime fails with `status`; with cudaSuccess it works again.
void make_fail(const std::string& function, cudaError_t status);

}  // namespace emulator

// Launches the kernels of a weight format. The files gemv_*.cu instantiate these functions.
#pragma once

#include <launch.cuh>

#include "../common/element.cuh"
#include "gemv.cuh"
#include "gemv_launch.h"

namespace mistral::cuda {

// Calls f with the traits of the format (formats.cuh). dtype is bf16 or f16.
template <WeightFormat kFormat, class F>
auto with_weights(DType dtype, const F& f) {
  return dtype == DType::bf16 ? f(typename WeightsOf<kFormat, __nv_bfloat16>::type{})
                              : f(typename WeightsOf<kFormat, __half>::type{});
}

template <WeightFormat kFormat>
bool LinearKernels<kFormat>::normalises_in_block(const LinearParams& p) {
  constexpr int64_t most = has_every_kernel(kFormat) ? kNormTokens : 8;
  if (!p.norm || p.tokens > most) return false;
  return with_weights<kFormat>(p.dtype, [&](auto weights) {
    using W = decltype(weights);
    const int64_t shared = p.tokens <= 8 ? linear_shared_bytes<W, 1, 1, true>(p)
                                         : linear_shared_bytes<W, 1, 2, true>(p);
    return shared <= shared_memory_size().of_block;
  });
}

// Launches one kernel. `rope` is empty or a RopeParams.
template <class W, int kM, int kN, bool kNorm, class... Rope>
cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream, const Rope&... rope) {
  constexpr int64_t kReservedShared = 1024;  // the runtime's share of a block's shared memory
  const int64_t shared = linear_shared_bytes<W, kM, kN, kNorm>(p);
  const bool two = kBlocksAtOnce<kM, kN> == 2 &&
                   2 * (shared + kReservedShared) <= shared_memory_size().of_multiprocessor;
  const int64_t at_once = multiprocessors() * (two ? 2 : 1);
  const dim3 grid(static_cast<unsigned>(min(blocks_of_all<kM>(p), at_once)));
  const auto start = [&](auto kernel) {
    return launch_overlapping(kernel, grid, dim3(kLinearThreads), static_cast<size_t>(shared),
                              stream, p, rope...);
  };
  if constexpr (sizeof...(Rope) > 0) {
    return start(linear_rope_kernel<W, kM, kN, kNorm>);
  } else {
    return start(linear_kernel<W, kM, kN, kNorm>);
  }
}

// Launches the kernel for p.tokens tokens. With more than 16 tokens, a block of outputs has two
// tiles, which share the loads of x.
template <class W, class... Rope>
cudaError_t launch_tokens(const LinearParams& p, bool in_block, cudaStream_t stream,
                          const Rope&... rope) {
  if (in_block && p.tokens <= 8) return launch_linear<W, 1, 1, true>(p, stream, rope...);
  if (in_block) return launch_linear<W, 1, 2, true>(p, stream, rope...);
  if (p.tokens <= 8) return launch_linear<W, 1, 1, false>(p, stream, rope...);
  if (p.tokens <= 16) return launch_linear<W, 1, 2, false>(p, stream, rope...);
  if (p.tokens <= 32) return launch_linear<W, 2, 4, false>(p, stream, rope...);
  return launch_linear<W, 2, 8, false>(p, stream, rope...);
}

// Does what launch_tokens does, for formats that have fewer kernels (has_every_kernel is false).
template <class W>
cudaError_t launch_with_few_kernels(const LinearParams& p, bool in_block, cudaStream_t stream) {
  constexpr int kM = W::kFurtherBytes > 0 ? 1 : 2;  // as many tiles as fit in shared memory
  if (in_block) return launch_linear<W, 1, 1, true>(p, stream);
  if (p.tokens <= 8) return launch_linear<W, 1, 1, false>(p, stream);
  return launch_linear<W, kM, 4, false>(p, stream);
}

template <WeightFormat kFormat>
cudaError_t LinearKernels<kFormat>::launch(const LinearParams& p, bool in_block,
                                           cudaStream_t stream) {
  return with_weights<kFormat>(p.dtype, [&](auto weights) {
    using W = decltype(weights);
    if constexpr (has_every_kernel(kFormat)) {
      return launch_tokens<W>(p, in_block, stream);
    } else {
      return launch_with_few_kernels<W>(p, in_block, stream);
    }
  });
}

template <WeightFormat kFormat>
cudaError_t LinearKernels<kFormat>::launch(const LinearParams& p, bool in_block,
                                           cudaStream_t stream, const RopeParams& rope) {
  if constexpr (has_every_kernel(kFormat)) {
    return with_weights<kFormat>(p.dtype, [&](auto weights) {
      return launch_tokens<decltype(weights)>(p, in_block, stream, rope);
    });
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace mistral::cuda

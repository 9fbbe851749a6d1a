// Chooses between the kernels and launches them.
#include "../linear.h"

#include <launch.cuh>

#include "element.cuh"
#include "linear_kernel.cuh"
#include "linear_norm.cuh"

namespace mistral::cuda {
namespace {

// Bytes that the runtime takes of a block's shared memory.
constexpr int64_t kReservedShared = 1024;

// Calls f with the format as the kernels have it.
template <class F>
cudaError_t with_weights(const LinearParams& p, const F& f) {
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    switch (p.format) {
      case WeightFormat::plain: return f(PlainWeights<T>{});
      case WeightFormat::int8: return f(Int8Weights<T>{});
      case WeightFormat::int4: return f(Int4Weights<T>{});
    }
    return cudaErrorInvalidValue;
  };
  switch (p.dtype) {
    case DType::bf16: return with_type(__nv_bfloat16{});
    case DType::f16: return with_type(__half{});
    case DType::f32: return cudaErrorInvalidValue;  // has no tensor core product of this precision
  }
  return cudaErrorInvalidValue;
}

// Rows are read by 16 bytes; places in them, in what is read of x, and outputs are counted in 32
// bits.
bool has_kernel(const LinearParams& p) {
  const int64_t row_unit = p.format == WeightFormat::int8 ? 16 : 8;
  int64_t longest = max(p.inputs, p.stride_x_token);
  for (int64_t i = 0; i < p.num_parts; ++i) longest = max(longest, p.parts[i].rows);
  return p.inputs % row_unit == 0 && longest <= INT32_MAX / 4;
}

// True if each block is to normalise x for itself.
template <class W>
bool normalises_in_block(const LinearParams& p) {
  if (!p.norm || p.tokens > kNormTokens) return false;
  const int64_t shared =
      p.tokens <= 8 ? linear_shared_bytes<W, 1, 1, true>(p) : linear_shared_bytes<W, 1, 2, true>(p);
  return shared <= shared_memory_size().of_block;
}

// `rope`: nothing, or RopeParams and Frequencies.
template <class W, int kM, int kN, bool kNorm, class... Rope>
cudaError_t launch_linear(const LinearParams& p, cudaStream_t stream, const Rope&... rope) {
  const int64_t shared = linear_shared_bytes<W, kM, kN, kNorm>(p);
  const bool two =
      kM == 1 && 2 * (shared + kReservedShared) <= shared_memory_size().of_multiprocessor;
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

// Of up to kMostTokens.
template <class W, class... Rope>
cudaError_t launch_tokens(LinearParams p, cudaStream_t stream, const Rope&... rope) {
  using T = typename W::Element;
  if (normalises_in_block<W>(p)) {
    if (p.tokens <= 8) return launch_linear<W, 1, 1, true>(p, stream, rope...);
    return launch_linear<W, 1, 2, true>(p, stream, rope...);
  }
  if (p.norm) {
    const cudaError_t status =
        launch(linear_norm_kernel<T>, dim3(static_cast<unsigned>(p.tokens)), dim3(kLinearThreads),
               kLinearWarps * sizeof(float), stream, p);
    if (status != cudaSuccess) return status;
    p.x = p.scratch;
    p.stride_x_token = p.inputs;
  }
  // With more tokens, more rows share what is read of x.
  if (p.tokens <= 8) return launch_linear<W, 1, 1, false>(p, stream, rope...);
  if (p.tokens <= 16) return launch_linear<W, 1, 2, false>(p, stream, rope...);
  if (p.tokens <= 32) return launch_linear<W, 2, 4, false>(p, stream, rope...);
  return launch_linear<W, 2, 8, false>(p, stream, rope...);
}

}  // namespace

int64_t linear_scratch_bytes(const LinearParams& p) {
  if (!p.norm) return 0;
  bool in_block = false;
  with_weights(p, [&](auto weights) {
    in_block = normalises_in_block<decltype(weights)>(p);
    return cudaSuccess;
  });
  return in_block ? 0 : min(p.tokens, kMostTokens) * p.inputs * 2;
}

cudaError_t linear(const LinearParams& given, cudaStream_t stream) {
  if (!has_kernel(given)) return cudaErrorInvalidValue;
  LinearParams p = given;
  return with_weights(p, [&](auto weights) {
    using W = decltype(weights);
    using T = typename W::Element;
    for (int64_t first = 0; first < given.tokens; first += kMostTokens) {
      p.x = static_cast<const T*>(given.x) + first * p.stride_x_token;
      p.out = static_cast<T*>(given.out) + first * p.stride_out_token;
      if (given.token_ids) p.token_ids = given.token_ids + first;
      p.tokens = min(given.tokens - first, kMostTokens);
      const cudaError_t status = launch_tokens<W>(p, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  });
}

cudaError_t linear_rope(const LinearRopeParams& p, cudaStream_t stream) {
  if (p.linear.tokens > kMostTokens) {
    LinearParams product = p.linear;
    product.epilogue = Epilogue::store;
    const cudaError_t status = linear(product, stream);
    return status == cudaSuccess ? rope(p.rope, stream) : status;
  }
  if (!has_kernel(p.linear)) return cudaErrorInvalidValue;
  if (p.linear.tokens == 0) return cudaSuccess;
  const Frequencies turns = frequencies(p.rope.theta, p.rope.head_dim / 2);
  return with_weights(p.linear, [&](auto weights) {
    return launch_tokens<decltype(weights)>(p.linear, stream, p.rope, turns);
  });
}

}  // namespace mistral::cuda

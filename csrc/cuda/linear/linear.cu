// Chooses between the kernels, which are in linear_<format>.cu.
#include "../../linear.h"

#include <launch.cuh>

#include "../common/element.cuh"
#include "gemv_launch.h"
#include "gemv_norm.cuh"

namespace mistral::cuda {
namespace {

// Calls f with the kernels of the weights' format.
template <class F>
auto with_kernels(const LinearParams& p, const F& f) {
  switch (p.format) {
    case WeightFormat::plain: break;
    case WeightFormat::int8: return f(LinearKernels<WeightFormat::int8>{});
    case WeightFormat::int4: return f(LinearKernels<WeightFormat::int4>{});
  }
  return f(LinearKernels<WeightFormat::plain>{});
}

// Rows are read by 16 bytes; places in them, in what is read of x, and outputs are counted in 32
// bits. There is no tensor core product of fp32's precision.
bool has_kernel(const LinearParams& p) {
  const int64_t row_unit = p.format == WeightFormat::int8 ? 16 : 8;
  int64_t longest = max(p.inputs, p.stride_x_token);
  for (int64_t i = 0; i < p.num_parts; ++i) longest = max(longest, p.parts[i].rows);
  return p.dtype != DType::f32 && p.inputs % row_unit == 0 && longest <= INT32_MAX / 4;
}

cudaError_t launch_norm(const LinearParams& p, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(p.tokens)), dim3(kLinearThreads),
                  kLinearWarps * sizeof(float), stream, p);
  };
  return p.dtype == DType::bf16 ? start(linear_norm_kernel<__nv_bfloat16>)
                                : start(linear_norm_kernel<__half>);
}

// Of up to kMostTokens. `rope`: nothing, or RopeParams.
template <class... Rope>
cudaError_t launch_tokens(LinearParams p, cudaStream_t stream, const Rope&... rope) {
  return with_kernels(p, [&](auto kernels) {
    const bool in_block = kernels.normalises_in_block(p);
    if (p.norm && !in_block) {
      const cudaError_t status = launch_norm(p, stream);
      if (status != cudaSuccess) return status;
      p.x = p.scratch;
      p.stride_x_token = p.inputs;
    }
    return kernels.launch(p, in_block, stream, rope...);
  });
}

}  // namespace

int64_t linear_scratch_bytes(const LinearParams& p) {
  if (!p.norm || !has_kernel(p)) return 0;
  const bool in_block =
      with_kernels(p, [&](auto kernels) { return kernels.normalises_in_block(p); });
  return in_block ? 0 : min(p.tokens, kMostTokens) * p.inputs * 2;
}

cudaError_t linear(const LinearParams& given, cudaStream_t stream) {
  if (!has_kernel(given)) return cudaErrorInvalidValue;
  LinearParams p = given;
  for (int64_t first = 0; first < given.tokens; first += kMostTokens) {
    using Element = uint16_t;  // either dtype has 2 bytes
    p.x = static_cast<const Element*>(given.x) + first * p.stride_x_token;
    p.out = static_cast<Element*>(given.out) + first * p.stride_out_token;
    if (given.token_ids) p.token_ids = given.token_ids + first;
    p.tokens = min(given.tokens - first, kMostTokens);
    const cudaError_t status = launch_tokens(p, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
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
  return launch_tokens(p.linear, stream, p.rope);
}

}  // namespace mistral::cuda

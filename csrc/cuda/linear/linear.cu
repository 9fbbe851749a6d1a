// Chooses and launches the kernels of linear layers. The kernels are in the files gemv_*.cu.
#include "../../linear.h"

#include <launch.cuh>

#include <algorithm>

#include "../../swiglu.h"
#include "../common/element.cuh"
#include "gemv_launch.h"
#include "gemv_norm.cuh"

namespace mistral::cuda {
namespace {

using Element16 = uint16_t;  // stands for bf16 and fp16, the only dtypes that have kernels

// Calls f with the kernels of the format of the first part.
template <class F>
auto with_kernels(const LinearParams& p, const F& f) {
  return with_format(p.parts[0].format,
                     [&](auto format) { return f(LinearKernels<format.value>{}); });
}

// The most tokens of one pass over all parts of a call.
int64_t tokens_of_pass(const LinearParams& p) {
  int64_t most = kMaxPassTokens;
  for (int64_t i = 0; i < p.num_parts; ++i) most = min(most, pass_tokens(p.parts[i].format));
  return most;
}

// The number of parts that one launch multiplies: the first part, and the parts right after it with
// the same format and group.
int64_t parts_alike(const LinearParams& p) {
  int64_t count = 1;
  while (count < p.num_parts && p.parts[count].format == p.parts[0].format &&
         p.parts[count].group == p.parts[0].group) {
    ++count;
  }
  return count;
}
bool is_mixed(const LinearParams& p) { return parts_alike(p) < p.num_parts; }

// Calls f with the params of each launch that a call needs, until one fails. The parts of a launch
// have the same format and group. `left` are the params of the call.
template <class F>
cudaError_t for_each_launch(LinearParams left, const F& f) {
  cudaError_t status = cudaSuccess;
  while (left.num_parts > 0 && status == cudaSuccess) {
    LinearParams launched = left;
    launched.num_parts = parts_alike(left);
    status = f(launched);
    for (int64_t i = 0; i < launched.num_parts; ++i) {
      left.out = static_cast<Element16*>(left.out) + left.parts[i].rows;
      if (left.added) left.added += left.parts[i].rows;
    }
    left.num_parts -= launched.num_parts;
    std::copy_n(launched.parts + launched.num_parts, left.num_parts, left.parts);
  }
  return status;
}

// Whether the kernels can compute p. They read rows 16 bytes at a time, and count in 32 bits. A
// limit of a quarter of that range for `longest` leaves room for the bytes of a row, 2 for each
// element, and for the columns of 3 parts together. There are no products of fp32, because the
// tensor cores have none of that precision. An argmax needs a single launch, because each launch
// writes token ids.
bool has_kernel(const LinearParams& p) {
  int64_t longest = max(p.inputs, p.stride_x_token);
  for (int64_t i = 0; i < p.num_parts; ++i) longest = max(longest, p.parts[i].rows);
  return p.dtype != DType::f32 && p.inputs % row_unit(p) == 0 && longest <= INT32_MAX / 4 &&
         !(p.epilogue == Epilogue::argmax && is_mixed(p));
}

// The bytes of scratch memory for the normalised rows of a pass. They are 0 if there is no norm, or
// if the blocks of all launches normalise the rows themselves.
int64_t normalised_bytes(const LinearParams& p) {
  if (!p.norm) return 0;
  bool in_blocks = true;
  for_each_launch(p, [&](const LinearParams& launched) {
    in_blocks = in_blocks && with_kernels(launched, [&](auto kernels) {
                  return kernels.normalises_in_block(launched);
                });
    return cudaSuccess;
  });
  return in_blocks ? 0 : min(p.tokens, tokens_of_pass(p)) * p.inputs * int64_t{sizeof(Element16)};
}

cudaError_t launch_norm(const LinearParams& p, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(p.tokens)), dim3(kLinearThreads),
                  kLinearWarps * sizeof(float), stream, p);
  };
  return p.dtype == DType::bf16 ? start(linear_norm_kernel<__nv_bfloat16>)
                                : start(linear_norm_kernel<__half>);
}

// Launches the kernels for up to tokens_of_pass tokens. `rope` is empty or a RopeParams.
template <class... Rope>
cudaError_t launch_tokens(LinearParams p, cudaStream_t stream, const Rope&... rope) {
  const bool before = normalised_bytes(p) > 0, in_block = p.norm && !before;
  if (before) {
    const cudaError_t status = launch_norm(p, stream);
    if (status != cudaSuccess) return status;
    p.x = p.scratch;
    p.stride_x_token = p.inputs;
  }
  return for_each_launch(p, [&](const LinearParams& launched) {
    return with_kernels(launched, [&](auto kernels) {
      return kernels.launch(launched, in_block, stream, rope...);
    });
  });
}

// Whether gate and up have different formats or groups. Then they need two launches, whose products
// go to scratch memory before SwiGLU.
bool swiglu_is_apart(const LinearParams& p) {
  return p.epilogue == Epilogue::swiglu && is_mixed(p);
}

// Computes the products of gate and up in two launches, then SwiGLU, for up to tokens_of_pass
// tokens.
cudaError_t launch_swiglu_apart(const LinearParams& p, cudaStream_t stream) {
  const int64_t dim = p.parts[0].rows;
  LinearParams products = p;
  products.epilogue = Epilogue::store;
  products.out = static_cast<char*>(p.scratch) + normalised_bytes(p);
  products.stride_out_token = 2 * dim;
  const cudaError_t status = launch_tokens(products, stream);
  if (status != cudaSuccess) return status;

  SwigluParams s{};
  s.dtype = p.dtype;
  s.gate = products.out;
  s.up = static_cast<const Element16*>(products.out) + dim;
  s.out = p.out;
  s.tokens = p.tokens;
  s.dim = dim;
  s.stride_gate_token = s.stride_up_token = products.stride_out_token;
  s.stride_out_token = p.stride_out_token;
  return swiglu(s, stream);
}

}  // namespace

int64_t row_unit(const LinearParams& p) {
  int64_t unit = 8;
  for (int64_t i = 0; i < p.num_parts; ++i) {
    if (info(p.parts[i].format).bits == 8) unit = 16;
  }
  return unit;
}

int64_t linear_scratch_bytes(const LinearParams& p) {
  if (!has_kernel(p)) return 0;
  const int64_t outputs = swiglu_is_apart(p) ? 2 * p.parts[0].rows : 0;
  return normalised_bytes(p) +
         min(p.tokens, tokens_of_pass(p)) * outputs * int64_t{sizeof(Element16)};
}

cudaError_t linear(const LinearParams& given, cudaStream_t stream) {
  if (!has_kernel(given)) return cudaErrorInvalidValue;
  LinearParams p = given;
  const int64_t most = tokens_of_pass(given);
  for (int64_t first = 0; first < given.tokens; first += most) {
    p.x = static_cast<const Element16*>(given.x) + first * p.stride_x_token;
    p.out = static_cast<Element16*>(given.out) + first * p.stride_out_token;
    if (given.added) p.added = given.added + first * p.stride_added_token;
    if (given.token_ids) p.token_ids = given.token_ids + first;
    p.tokens = min(given.tokens - first, most);
    const cudaError_t status =
        swiglu_is_apart(p) ? launch_swiglu_apart(p, stream) : launch_tokens(p, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t linear_rope(const LinearRopeParams& p, cudaStream_t stream) {
  if (!has_kernel(p.linear)) return cudaErrorInvalidValue;
  if (p.linear.tokens == 0) return cudaSuccess;
  if (p.linear.tokens > kMaxPassTokens || is_mixed(p.linear) ||
      !has_every_kernel(p.linear.parts[0].format)) {
    LinearParams product = p.linear;
    product.epilogue = Epilogue::store;
    const cudaError_t status = linear(product, stream);
    return status == cudaSuccess ? rope(p.rope, stream) : status;
  }
  return launch_tokens(p.linear, stream, p.rope);
}

}  // namespace mistral::cuda

// The kernel for plain weights. Grid: one block per token. A thread owns every blockDim-th vector
// of the token's row: 16 bytes, or one element if rows are not aligned. The kernel of
// linear/dequantize.cu is for weights with scales.
#include "../embedding.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kMaxThreads = 512;

template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) embedding_kernel(const EmbeddingParams p) {
  const int64_t token = blockIdx.x, row = load_global(p.token_ids + token);
  const bool is_there = row >= 0 && row < p.weight.rows;
  const T* const from = static_cast<const T*>(p.weight.values) + (is_there ? row : 0) * p.dim;
  T* const out = static_cast<T*>(p.out) + token * p.dim;
  Vec<T, N> values;
#pragma unroll
  for (int j = 0; j < N; ++j) values.values[j] = from_float<T>(NAN);
  for (int64_t i = int64_t{threadIdx.x} * N; i < p.dim; i += int64_t{blockDim.x} * N) {
    if (is_there) values = load<N>(from + i);
    store(out + i, values);
  }
}

template <class T, int N>
cudaError_t launch_rows(const EmbeddingParams& p, cudaStream_t stream) {
  const int64_t threads = min(ceil_div(ceil_div(p.dim, N), kWarp) * kWarp, kMaxThreads);
  return launch(embedding_kernel<T, N>, dim3(static_cast<unsigned>(p.tokens)),
                dim3(static_cast<unsigned>(threads)), 0, stream, p);
}

}  // namespace

cudaError_t embedding(const EmbeddingParams& p, cudaStream_t stream) {
  if (p.dim == 0) return cudaSuccess;
  if (p.weight.format != WeightFormat::plain) {
    return dequantize({p.dtype, p.weight, p.token_ids, p.out, p.tokens, p.dim}, stream);
  }
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = kVec16<T>;
    return fit_vec16<T>({p.weight.values, p.out}, {p.dim}) ? launch_rows<T, kWide>(p, stream)
                                                           : launch_rows<T, 1>(p, stream);
  });
}

}  // namespace mistral::cuda

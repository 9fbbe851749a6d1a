// Grid: one block per token. First the threads of a block divide the D/2 angles among themselves,
// and write the cosines and sines to shared memory. Then they divide the heads among themselves, in
// items. An item is 16 bytes of the first half of a head (one element if rows are not aligned) and
// the matching bytes of the second half.
#include "../rotate.h"

#include <launch.cuh>

#include "common/element.cuh"
#include "common/vec.cuh"
#include "rotation.cuh"
#include "rotation_launch.cuh"

namespace mistral::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kRotationThreads) rotate_kernel(const RotateParams p) {
  const int64_t token = blockIdx.x;
  const Sequence s = p.sequences[find_sequence(p.sequences, p.num_sequences, token)];
  const int64_t position = s.position + token - s.first_token;
  const int half = static_cast<int>(p.head_dim) / 2, accesses = half / N;

  auto* turns = dynamic_shared<float2>();
  for (int i = threadIdx.x; i < half; i += kRotationThreads) {
    const uint64_t angle = turns_per_position(load_global(p.frequencies + i));
    turns[i] = cosine_and_sine(static_cast<uint64_t>(p.backward ? -position : position) * angle);
  }
  __syncthreads();

  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  T* out = static_cast<T*>(p.out) + token * p.stride_out_token;
  for (int item = threadIdx.x; item < p.heads * accesses; item += kRotationThreads) {
    const int i = item % accesses * N;
    const T* from = x + item / accesses * p.stride_x_head + i;
    T* to = out + item / accesses * p.stride_out_head + i;
    Vec<T, N> first = load<N>(from), second = load<N>(from + half);
    rotate_pairs(first, second, turns + i);
    store(to, first);
    store(to + half, second);
  }
}

}  // namespace

cudaError_t rotate(const RotateParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = fit_vec16<T>(
        {p.x, p.out}, {p.stride_x_token, p.stride_x_head, p.stride_out_token, p.stride_out_head});
    return launch_tokens(wide ? rotate_kernel<T, kVec16<T>> : rotate_kernel<T, 1>, p, stream);
  });
}

}  // namespace mistral::cuda

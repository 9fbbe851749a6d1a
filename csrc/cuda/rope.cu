// Grid: one block per token. First the threads of a block divide the D/2 angles among themselves,
// and write the cosines and sines to shared memory. Then they divide the heads of q, k and v among
// themselves, in items. An item is 16 bytes of the first half of a head (one element if rows are
// not aligned) and the matching bytes of the second half. q and k are read once and rotated in
// place. v and the rotated k are stored in the ring if `stored_before_attention` (ring.h) holds for
// the token.
#include "../rope.h"

#include <launch.cuh>

#include "append.cuh"
#include "common/element.cuh"
#include "common/vec.cuh"
#include "rotation.cuh"
#include "rotation_launch.cuh"

namespace mistral::cuda {
namespace {

// The addresses at which one head of one token is read and stored.
template <class T>
struct Head {
  const T* in;
  T* rotated;  // where the rotated head is stored; null for v
  T* slot;     // where the head is stored in the ring; null: this kernel does not store it there
};

// Finds the addresses of head `index`, which counts the heads of q first, then those of k, then
// those of v. `stores` says whether this kernel stores the token in the ring. If it does not,
// `index` must not be a head of v, because the only thing to do with v is to store it.
template <class T>
__device__ __forceinline__ Head<T> find_head(const RopeParams& p, const Sequence& s, int64_t token,
                                             int64_t position, bool stores, int index) {
  const int q_heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads);
  if (index < q_heads) {
    T* q = static_cast<T*>(p.q) + token * p.stride_q_token + index * p.stride_q_head;
    return {q, q, nullptr};
  }
  if (index < q_heads + kv_heads) {
    const int head = index - q_heads;
    T* k = static_cast<T*>(p.k) + token * p.stride_k_token + head * p.stride_k_head;
    return {k, k, stores ? ring_address<T>(p.k_pool, p, s, head, position) : nullptr};
  }
  const int head = index - q_heads - kv_heads;
  const T* v = static_cast<const T*>(p.v) + token * p.stride_v_token + head * p.stride_v_head;
  return {v, nullptr, ring_address<T>(p.v_pool, p, s, head, position)};
}

template <class T, int N>
__global__ void __launch_bounds__(kRotationThreads) rope_kernel(const RopeParams p) {
  const int64_t token = blockIdx.x;
  const Sequence s = p.sequences[find_sequence(p.sequences, p.num_sequences, token)];
  const int64_t position = s.position + token - s.first_token;
  const int half = static_cast<int>(p.head_dim) / 2, accesses = half / N;

  auto* turns = dynamic_shared<float2>();
  for (int i = threadIdx.x; i < half; i += kRotationThreads) {
    const uint64_t angle = turns_per_position(load_global(p.frequencies + i));
    turns[i] = cosine_and_sine(static_cast<uint64_t>(position) * angle);
  }
  __syncthreads();

  const bool stores = stored_before_attention(s, position, p.window);
  const int heads = static_cast<int>(p.heads + (stores ? 2 : 1) * p.kv_heads);
  for (int item = threadIdx.x; item < heads * accesses; item += kRotationThreads) {
    const int i = item % accesses * N;
    const Head<T> head = find_head<T>(p, s, token, position, stores, item / accesses);
    Vec<T, N> first = load<N>(head.in + i), second = load<N>(head.in + half + i);
    if (head.rotated) {
      rotate_pairs(first, second, turns + i);
      store(head.rotated + i, first);
      store(head.rotated + half + i, second);
    }
    if (head.slot) {
      store(head.slot + i, first);
      store(head.slot + half + i, second);
    }
  }
}

}  // namespace

cudaError_t rope(const RopeParams& p, cudaStream_t stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = fit_vec16<T>({p.q, p.k, p.v, p.k_pool, p.v_pool},
                                   {p.stride_q_token, p.stride_q_head, p.stride_k_token,
                                    p.stride_k_head, p.stride_v_token, p.stride_v_head});
    return launch_tokens(wide ? rope_kernel<T, kVec16<T>> : rope_kernel<T, 1>, p, stream);
  });
}

}  // namespace mistral::cuda

// A late token is a new token that takes the slot of an older token that attention still reads
// (`stored_after_attention` in ring.h). It may be stored in the ring only when no block reads the
// older tokens any more. So the block or warpgroup that finishes a sequence and key/value head last
// stores the late tokens.
#pragma once

#include <launch.cuh>

#include "../../attention.h"
#include "../append.cuh"
#include "../common/arrival.cuh"
#include "../common/vec.cuh"

namespace mistral::cuda {

// Whether the sequence has a late token. It is enough to look at the last new token, because it
// replaces the newest of all replaced tokens, the one that attention stops reading last.
__device__ __forceinline__ bool has_late_tokens(const AttentionParams& p, const Sequence& s) {
  return stored_after_attention(s, s.position + s.count - 1, p.window);
}

// Stores the late tokens of one key/value head. `threads` threads share the work.
template <class T, int D>
__device__ void append_late(const AttentionParams& p, const Sequence& s, int kv_head,
                            unsigned thread, unsigned threads) {
  constexpr int kChunks = D / kVec16<T>;
  const int64_t first = first_stored(s);
  const int64_t items = (s.position + s.count - first) * kChunks;
  for (int64_t item = thread; item < items; item += threads) {
    const int64_t position = first + item / kChunks;
    if (!stored_after_attention(s, position, p.window)) continue;
    const int64_t token = s.first_token + position - s.position;
    const int i = static_cast<int>(item % kChunks) * kVec16<T>;
    const T* k = static_cast<const T*>(p.k) + token * p.stride_k_token + kv_head * p.stride_k_head;
    const T* v = static_cast<const T*>(p.v) + token * p.stride_v_token + kv_head * p.stride_v_head;
    store16(ring_address<T>(p.k_pool, p, s, kv_head, position) + i, load16(k + i));
    store16(ring_address<T>(p.v_pool, p, s, kv_head, position) + i, load16(v + i));
  }
}

}  // namespace mistral::cuda

// The place in a ring where the key and value of a new token are stored. rope stores some new
// tokens before attention, and attention itself stores others afterwards. ring.h says which.
#pragma once

#include "../ring.h"
#include "common/vec.cuh"

namespace mistral::cuda {

// The address in `pool` of the row for key/value head `head` of the token at `position`. `pool` is
// p.k_pool or p.v_pool. Params is RopeParams or AttentionParams.
template <class T, class Params>
__device__ __forceinline__ T* ring_address(void* pool, const Params& p, const Sequence& s,
                                           int64_t head, int64_t position) {
  return static_cast<T*>(pool) + ring_row(s, head, position) * p.head_dim;
}

}  // namespace mistral::cuda

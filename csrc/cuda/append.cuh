// Where a new token's keys and values are stored: rope does it for the tokens that may be stored
// before attention, attention for the others.
#pragma once

#include "../ring.h"
#include "common/vec.cuh"

namespace mistral::cuda {

// Where `head` of the token at `position` belongs in `pool`, k_pool or v_pool. Params: RopeParams
// or AttentionParams, which name their fields alike.
template <class T, class Params>
__device__ __forceinline__ T* ring_address(void* pool, const Params& p, const Sequence& s,
                                           int64_t head, int64_t position) {
  return static_cast<T*>(pool) + ring_row(s, head, position) * p.head_dim;
}

}  // namespace mistral::cuda

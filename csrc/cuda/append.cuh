// Where the keys and values of a new token are stored. rope stores those that may be stored before
// attention, and attention stores the others.
#pragma once

#include "../ring.h"
#include "common/vec.cuh"

namespace mistral::cuda {

// Where `head` of the token at `position` belongs in `pool`, which is k_pool or v_pool. Params is
// RopeParams or AttentionParams: the fields that are used have the same names in both.
template <class T, class Params>
__device__ __forceinline__ T* ring_address(void* pool, const Params& p, const Sequence& s,
                                           int64_t head, int64_t position) {
  return static_cast<T*>(pool) + ring_row(s, head, position) * p.head_dim;
}

}  // namespace mistral::cuda

// Finds out which of several blocks or warpgroups finishes last. The last one may use the results
// of all the others.
#pragma once

#include <launch.cuh>

#include "vec.cuh"

namespace mistral::cuda {

// All threads of each party (a block or a warpgroup) call this when the party has finished. Returns
// true to the threads of the party that arrives last, and false to all others. All reads and writes
// that the other parties made before their arrival are then complete. `sync` is a barrier of the
// party's threads. `last` is a word in shared memory that only this party uses. The counter is zero
// before the first arrival and after the last.
template <class Sync>
__device__ __forceinline__ bool arrives_last(int32_t* counter, int parties, int thread, int* last,
                                             const Sync& sync) {
  sync();
  if (thread == 0) {
    // Fences by one thread are enough for its whole party, because the barriers order the accesses
    // of the other threads before and after these fences.
    __threadfence();
    *last = atomicAdd(counter, 1) == parties - 1;
    __threadfence();
    if (*last) store_global(counter, int32_t{0});
  }
  sync();
  return *last;
}

// arrives_last for whole blocks. It overwrites the first word of the block's shared memory.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int blocks) {
  return arrives_last(counter, blocks, threadIdx.x, dynamic_shared<int>(), [] { __syncthreads(); });
}

}  // namespace mistral::cuda

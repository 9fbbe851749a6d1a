// Finds the last of several blocks to finish, which may then use the results of all of them.
#pragma once

#include <launch.cuh>

#include "vec.cuh"

namespace mistral::cuda {

// A party is a block or a warpgroup. `sync` is a barrier of its threads, and `last` is a word of
// its shared memory. Returns true to all threads of the last party to arrive. What the other
// parties read and wrote before they arrived is then complete. The counter is zero before the first
// arrival and after the last.
template <class Sync>
__device__ __forceinline__ bool arrives_last(int32_t* counter, int parties, int thread, int* last,
                                             const Sync& sync) {
  sync();
  if (thread == 0) {
    // The fences of one thread suffice for its whole party, because the barriers order the accesses
    // of the other threads around them.
    __threadfence();
    *last = atomicAdd(counter, 1) == parties - 1;
    __threadfence();
    if (*last) store_global(counter, int32_t{0});
  }
  sync();
  return *last;
}

// arrives_last for whole blocks. Uses the first word of shared memory.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int blocks) {
  return arrives_last(counter, blocks, threadIdx.x, dynamic_shared<int>(), [] { __syncthreads(); });
}

}  // namespace mistral::cuda

// Finds the last of several blocks to finish. This block may use the results of all the others.
#pragma once

#include <launch.cuh>

#include "vec.cuh"

namespace mistral::cuda {

// Each party, a block or a warpgroup, calls this when it has finished. Returns true to all threads
// of the last party to arrive. What the other parties read and wrote before they arrived is then
// complete. `sync` is a barrier of the party's threads, and `last` is a word of shared memory of
// the party. The counter is zero before the first arrival and after the last.
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

// arrives_last for whole blocks. It uses the first word of shared memory.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int blocks) {
  return arrives_last(counter, blocks, threadIdx.x, dynamic_shared<int>(), [] { __syncthreads(); });
}

}  // namespace mistral::cuda

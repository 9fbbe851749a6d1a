// Which of several blocks is the last one to be done, and may use what all have left.
#pragma once

#include <launch.cuh>

#include "vec.cuh"

namespace mistral::cuda {

// True in the last of `parties` to get here, for all its threads; what the others wrote and read
// before is then done. Leaves the counter at zero, as it found it. A party is a block or a
// warpgroup: `sync` is a barrier of its threads, `last` a word of its shared memory.
template <class Sync>
__device__ __forceinline__ bool arrives_last(int32_t* counter, int parties, int thread, int* last,
                                             const Sync& sync) {
  sync();
  if (thread == 0) {
    // One thread's fences do for all: barriers order the others' accesses before and after them.
    __threadfence();
    *last = atomicAdd(counter, 1) == parties - 1;
    __threadfence();
    if (*last) store_global(counter, int32_t{0});
  }
  sync();
  return *last;
}

// The same among blocks. Uses the first word of shared memory.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int blocks) {
  return arrives_last(counter, blocks, threadIdx.x, dynamic_shared<int>(), [] { __syncthreads(); });
}

}  // namespace mistral::cuda

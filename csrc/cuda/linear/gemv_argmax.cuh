// The largest output of each token, found behind the product: no second pass over the logits.
//
// Outputs are compared by their ranks (sample.h), integers of which no two are equal, so neither
// the order of blocks nor that of warps matters.
#pragma once

#include "../../linear.h"
#include "../common/arrival.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace mistral::cuda {

// With all lanes of a warp, of which those 4 apart have outputs of the same token, and each knows
// the highest rank of its own (0: it has none).
__device__ __forceinline__ void contribute(const LinearParams& p, int token, Rank best) {
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
    best = higher(best, __shfl_xor_sync(kAllLanes, best, distance));
  }
  if (threadIdx.x % kWarp < 4 && best != 0) {
    atomicMax(&p.running->best[token], static_cast<unsigned long long>(best));
  }
}

// At the end of the kernel, with all threads of a block: the last block writes the tokens.
__device__ __forceinline__ void choose_tokens(const LinearParams& p) {
  if (!arrives_last(&p.running->arrived, gridDim.x) || threadIdx.x >= p.tokens) return;
  const Rank best = atomicExch(&p.running->best[threadIdx.x], 0ull);
  store_global(p.token_ids + threadIdx.x, greedy_choice(best));
}

}  // namespace mistral::cuda

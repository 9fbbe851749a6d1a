// Finds the largest output of each token within the kernel of the product, without a second pass
// over the outputs.
//
// Outputs are compared by their ranks (sample.h). Ranks are integers, and no two are equal, so the
// result does not depend on the order of blocks and warps.
#pragma once

#include "../../linear.h"
#include "../common/arrival.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace mistral::cuda {

// Updates the running argmax of `token`. All lanes of a warp call this. `best` is the highest rank
// among the lane's outputs of the token, or 0 if there are none. Lanes that are 4 apart have the
// same token.
__device__ __forceinline__ void contribute(const LinearParams& p, int token, Rank best) {
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) {
    best = higher(best, __shfl_xor_sync(kAllLanes, best, distance));
  }
  if (threadIdx.x % kWarp < 4 && best != 0) {
    atomicMax(&p.running->best[token], static_cast<unsigned long long>(best));
  }
}

// All threads call this at the end of the kernel. The block that arrives last writes the token ids
// and zeros the running argmax for the next call.
__device__ __forceinline__ void choose_tokens(const LinearParams& p) {
  if (!arrives_last(&p.running->arrived, gridDim.x) || threadIdx.x >= p.tokens) return;
  const Rank best = atomicExch(&p.running->best[threadIdx.x], 0ull);
  store_global(p.token_ids + threadIdx.x, greedy_choice(best));
}

}  // namespace mistral::cuda

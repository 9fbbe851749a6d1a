// Sums of products whose weights share a Scaling (scales.cuh), before the Scaling is applied. Such
// weights are called a group in this file.
#pragma once

#include <ptx.cuh>

#include <type_traits>

#include "scales.cuh"

namespace mistral::cuda {

// The sums of a group for kM tiles of 16 rows and kN times 8 tokens.
template <class W, int kM, int kN>
struct GroupSums {
  float sums[kM][kN][4] = {};
  // Only with W::kOffset: sums of x over the group. The weights' offset is multiplied by them.
  float sums_of_x[kN][4] = {};

  // Adds the x of a step to sums_of_x. A product with ones leaves each sum in the lane that needs
  // it. `x` has the operands of the step's two products, for 8 tokens.
  __device__ __forceinline__ void add_x(int n, const uint32_t (&x)[2][2]) {
    using T = typename W::Element;
    constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(sums_of_x[n], ones, x[i]);
  }

  // Ends a group. Adds its scaled sums to `out`, and begins the next group with sums of 0. `scales`
  // belong to the lane's two rows of each tile. i is the argument of Scales::next (scales.cuh).
  __device__ __forceinline__ void add_to(float (&out)[kM][kN][4],
                                         typename W::Scales (&scales)[kM][2], int i) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Scaling scaling = scales[m][half].next(i);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            out[m][n][j] += scaling.factor * sums[m][n][j];
            if constexpr (W::kOffset) out[m][n][j] += scaling.offset * sums_of_x[n][j];
            sums[m][n][j] = 0.0f;
          }
        }
      }
    }
    if constexpr (W::kOffset) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_of_x[n][j] = 0.0f;
      }
    }
  }
};

}  // namespace mistral::cuda

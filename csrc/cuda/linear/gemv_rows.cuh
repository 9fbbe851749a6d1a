// Loads rows of x as operands of the tensor cores. The rows are in global memory, or in shared
// memory if the block has put normalised rows there (kNormalised).
#pragma once

#include <ptx.cuh>

#include "../../linear.h"
#include "../common/vec.cuh"
#include "gemv_norm.cuh"

namespace mistral::cuda {

// The rows of x of which a lane loads elements: row lane / 4 of each 8 tokens. If there is no such
// token, the lane takes the row of the last token, and the product is not stored.
template <class W, int kN, bool kNormalised>
class LaneRows {
 public:
  __device__ __forceinline__ LaneRows(const LinearParams& p, int inputs, int lane)
      : rows_(static_cast<const uint4*>(p.x)), inputs_(inputs) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto token = static_cast<uint32_t>(min(8 * n + lane / 4, p.tokens - 1));
      offsets_[n] = token * static_cast<uint32_t>(p.stride_x_token / 8);
    }
  }

  // From now on, loads the rows that normalise_x has written, instead of the rows of p.x.
  __device__ __forceinline__ void use_normalised(const LinearParams& p, const void* rows,
                                                 int lane) {
    rows_ = static_cast<const uint4*>(rows);
    const int stride = normalised_row<W>(p.inputs), last = static_cast<int>(p.tokens) - 1;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      offsets_[n] = static_cast<uint32_t>(min(8 * n + lane / 4, last) * stride / 8);
    }
  }

  // Loads the elements that the lane needs in kSteps steps of a chunk, from `first_step` on.
  template <int kSteps>
  __device__ __forceinline__ void load(uint4 (&to)[kSteps][kN], int chunk, int first_step) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int k = chunk * W::kValues + W::k_at(first_step + i, lane % 4);
#pragma unroll
      for (int n = 0; n < kN; ++n) to[i][n] = load_step(rows_ + offsets_[n], k);
    }
  }

 private:
  // Loads the elements of a row that the lane needs in a step. The first of them is element k.
  __device__ __forceinline__ uint4 load_step(const uint4* row, int k) const {
    if constexpr (W::kHalfSteps) {  // in such formats rows have whole chunks only, so k < K
      const auto* const from = reinterpret_cast<const uint2*>(row) + static_cast<uint32_t>(k) / 4;
      const auto load8 = [](const uint2* at) {
        return kNormalised ? ld_shared_8(at) : load_global(at);
      };
      const uint2 first = load8(from), second = load8(from + 4);
      return {first.x, first.y, second.x, second.y};
    } else {
      const uint4* const from = row + static_cast<uint32_t>(k) / 8;
      if constexpr (kNormalised) return ld_shared_16(from);
      return k < inputs_ ? ld_global_16(from) : uint4{};
    }
  }

  const uint4* rows_;
  int inputs_;
  uint32_t offsets_[kN];  // in units of 16 bytes, so that 32 bits are enough
};

}  // namespace mistral::cuda

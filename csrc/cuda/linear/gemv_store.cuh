// Finishes the outputs of a product: multiplies by the scales of rows, adds the residual and
// LinearParams::added, applies SwiGLU, rounds and stores, and finds the largest output.
#pragma once

#include "../../linear.h"
#include "../common/vec.cuh"
#include "gemv_argmax.cuh"
#include "weight_stream.cuh"

namespace mistral::cuda {

// The four outputs that a lane finishes for 8 tokens and one tile of 16 rows. They are in the order
// of the sums of mma_m16n8k16. Outputs 0 and 1 belong to row lane / 4. The first is for token
// 2 * (lane % 4) of the 8 tokens, the second for the token after it. Outputs 2 and 3 belong to row
// lane / 4 + 8, for the same tokens. With SwiGLU, the lower 8 rows belong to `up`, and only outputs
// 0 and 1 exist.
template <class W>
struct Outputs {
  using T = typename W::Element;

  const LinearParams& p;
  int first_token;   // token of outputs 0 and 2
  int first_column;  // column of outputs 0 and 1
  T* address[4];     // where the outputs are stored; null: there is no such output
  float scales[2];   // with W::kRowScaled: the scales of the two rows
  T before[4];       // with Epilogue::add: the residual

  // Loads scales and residual ahead of their use. `output` is the first output of the tile, counted
  // within the block. `token` is the first of the 8 tokens.
  __device__ __forceinline__ Outputs(const LinearParams& p, const OutputBlock<false>& block,
                                     int output, int64_t token)
      : p(p) {
    const int lane = threadIdx.x % kWarp;
    first_token = static_cast<int>(token) + 2 * (lane % 4);
    first_column = block.column + output + lane / 4;
    const bool swiglu = p.epilogue == Epilogue::swiglu;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.row_of(output + lane / 4, half);
      const bool inside = row < block.count;
      if constexpr (W::kRowScaled) {
        const auto* const of_part =
            static_cast<const typename W::Scales::Unit*>(p.parts[block.part_of(half)].scales) +
            block.first;
        scales[half] = inside && token < p.tokens ? to_float(load_global(of_part + row)) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t t = token + 2 * (lane % 4) + i;
        const bool wanted = inside && t < p.tokens && !(swiglu && half == 1);
        address[2 * half + i] =
            wanted ? static_cast<T*>(p.out) + t * p.stride_out_token + block.column + row : nullptr;
        if (wanted && p.epilogue == Epilogue::add) {
          before[2 * half + i] = load_global(address[2 * half + i]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float (&sums)[4]) const {
    if constexpr (W::kRowScaled) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] *= scales[i / 2];
    }
    const bool argmax = p.epilogue == Epilogue::argmax;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Rank best = 0;
#pragma unroll
      for (int i = j; i < 4; i += 2) {
        if (!address[i]) continue;
        float result = sums[i];
        if (p.epilogue == Epilogue::add) result += to_float(before[i]);
        const float* added = p.added ? added_to(address[i], first_token + j) : nullptr;
        if (added) result += load_global(added);
        if (p.epilogue == Epilogue::swiglu) {
          float up = sums[i + 2];
          if (added) up += load_global(added + p.parts[0].rows);
          result = result / (1.0f + expf(-result)) * up;
        }
        const T rounded = from_float<T>(result);
        store_global(address[i], rounded);
        const int id = first_column + i / 2 * 8;
        if (argmax && id < p.limit) best = higher(best, rank_of(key_of(to_float(rounded)), id));
      }
      if (argmax) contribute(p, first_token + j, best);
    }
  }

 private:
  // The address in p.added of the number for the output whose address is `output`. The number has
  // the same column in p.added as the output has in p.out. That is so in every launch of a call,
  // because linear.cu moves both pointers by the same number of columns.
  __device__ __forceinline__ const float* added_to(const T* output, int64_t token) const {
    const int64_t column = output - static_cast<const T*>(p.out) - token * p.stride_out_token;
    return p.added + token * p.stride_added_token + column;
  }
};

// Finishes outputs without RoPE. RopeFinish has the same interface. The kernel calls `begin` once,
// with shared memory that RopeFinish fills with tables. It calls `outputs` in each round, before
// the sums are known, to load ahead of time what Outputs::store needs.
template <class W>
struct StoreFinish {
  static constexpr bool kRope = false;

  const LinearParams& p;

  __device__ __forceinline__ void begin(char*) {}
  __device__ __forceinline__ Outputs<W> outputs(const OutputBlock<false>& block, int output,
                                                int64_t token) const {
    return {p, block, output, token};
  }
};

}  // namespace mistral::cuda

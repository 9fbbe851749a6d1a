// Applies RoPE within the kernel that computes query, key and value, and appends keys and values to
// the rings (ring.h). Products are rounded before they are rotated, so the results have the same
// bits as those of a product followed by the op rope.
#pragma once

#include "../../linear.h"
#include "../append.cuh"
#include "../common/vec.cuh"
#include "../rotation.cuh"
#include "weight_stream.cuh"

namespace mistral::cuda {

// Facts about a token that a block looks up once for all of its outputs.
struct NewToken {
  uint64_t position;
  TokenRows rows;  // where its key and value belong in the rings
  bool stored;     // whether this kernel stores them there
};

// The outputs that a lane finishes for 8 tokens and one tile. There are two pairs, one for token
// 2 * (lane % 4) of the 8 tokens, and one for the token after it. RoPE rotates a pair. Its first
// element is row lane / 4 of the tile, and its second the row of the weight that lies D/2 further.
// The constructor's `token` is the first of the 8 tokens, `output` the first row of the tile.
template <class W>
struct RotatedOutputs {
  using T = typename W::Element;

  int half;         // D/2
  bool rotated;     // false: these are outputs of the value
  T* address[2];    // where the first element of the pair is stored; null: there is no such token
  T* slot[2];       // the same in the ring; null: it is not stored there
  float2 turn[2];   // if rotated: cosine and sine of the angle
  float scales[2];  // with W::kRowScaled: the scales of the two rows

  __device__ __forceinline__ RotatedOutputs(const LinearParams& p, const RopeParams& rope,
                                            const uint64_t* angles, const NewToken* tokens,
                                            const OutputBlock<true>& block, int output,
                                            int64_t token)
      : half(block.half_head), rotated(block.part < 2) {
    const int lane = threadIdx.x % kWarp, row = block.row_of(output + lane / 4, 0);
    const int in_part = block.first + row;
    const int head = in_part / (2 * half), i = in_part % (2 * half);
    if constexpr (W::kRowScaled) {
      const auto* const of_part =
          static_cast<const typename W::Scales::Unit*>(p.parts[block.part].scales) + in_part;
      scales[0] = token < p.tokens ? to_float(load_global(of_part)) : 0.0f;
      scales[1] = token < p.tokens ? to_float(load_global(of_part + half)) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t t = token + 2 * (lane % 4) + j;
      address[j] = nullptr;
      slot[j] = nullptr;
      if (t >= p.tokens) continue;
      const NewToken& found = tokens[t];
      address[j] = static_cast<T*>(p.out) + t * p.stride_out_token + block.column + row;
      if (found.stored && block.part > 0) {
        void* const pool = block.part == 1 ? rope.k_pool : rope.v_pool;
        slot[j] = static_cast<T*>(pool) + found.rows.row(head) * rope.head_dim + i;
      }
      if (rotated) turn[j] = cosine_and_sine(found.position * angles[i]);
    }
  }

  __device__ __forceinline__ void store(float (&sums)[4]) const {
    if constexpr (W::kRowScaled) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] *= scales[j / 2];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!address[j]) continue;
      T first = from_float<T>(sums[j]), second = from_float<T>(sums[j + 2]);
      if (rotated) {
        const float2 pair = rotate_pair(to_float(first), to_float(second), turn[j]);
        first = from_float<T>(pair.x);
        second = from_float<T>(pair.y);
      }
      store_global(address[j], first);
      store_global(address[j] + half, second);
      if (slot[j]) {
        store_global(slot[j], first);
        store_global(slot[j] + half, second);
      }
    }
  }
};

// Finishes outputs with RoPE. The comment at StoreFinish describes the interface.
template <class W>
struct RopeFinish {
  static constexpr bool kRope = true;

  const LinearParams& p;
  const RopeParams& rope;
  // Tables in shared memory, which `begin` fills.
  const uint64_t* angles;  // [D/2], the angle of each pair at position 1 (turns_per_position)
  const NewToken* tokens;  // [T]

  // The bytes of shared memory that `begin` fills.
  static int64_t shared_bytes(const LinearParams& p) {
    return p.head_dim / 2 * int64_t{sizeof(uint64_t)} + p.tokens * int64_t{sizeof(NewToken)};
  }
  __device__ __forceinline__ void begin(char* shared) {
    const int half = static_cast<int>(rope.head_dim) / 2;
    auto* const turns = reinterpret_cast<uint64_t*>(shared);
    for (int i = threadIdx.x; i < half; i += kLinearThreads) {
      turns[i] = turns_per_position(load_global(rope.frequencies + i));
    }
    angles = turns;
    auto* const found = reinterpret_cast<NewToken*>(turns + half);
    for (int t = threadIdx.x; t < p.tokens; t += kLinearThreads) {
      const Sequence s = rope.sequences[find_sequence(rope.sequences, rope.num_sequences, t)];
      const int64_t position = s.position + t - s.first_token;
      found[t] = {static_cast<uint64_t>(position), token_rows(s, position),
                  stored_before_attention(s, position, rope.window)};
    }
    tokens = found;
  }
  __device__ __forceinline__ RotatedOutputs<W> outputs(const OutputBlock<true>& block, int output,
                                                       int64_t token) const {
    return {p, rope, angles, tokens, block, output, token};
  }
};

}  // namespace mistral::cuda

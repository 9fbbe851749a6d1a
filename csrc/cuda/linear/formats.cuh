// Loads weights of each format from shared memory, widens them and arranges them as operands of
// m16n8k16.
//
// A chunk is 128 bytes of a row: a cache line, which holds 64, 128 or 256 values. A dot product
// does not depend on the order of k, so a lane multiplies 4, 8 or 16 neighbouring bytes of values
// as they are stored. In every step of 32 values of k a lane has 8 neighbours, from k_at on, of two
// rows of the weights and, in the same order, of each token.
//
// Values of 8 and 4 bits become floating-point numbers without a table or a conversion: their bits
// become the low mantissa bits of a power of two whose mantissa unit is 1, and subtracting the
// power is exact. Scales are applied to the sums, in fp32.
#pragma once

#include <ptx.cuh>

#include <type_traits>

#include "../../linear.h"
#include "../common/element.cuh"
#include "../common/reduce.cuh"

namespace mistral::cuda {

constexpr int kChunkBytes = 128;
constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * kChunkBytes;

// The chunks of 16 rows in shared memory. The place of piece i (16 bytes) of a row depends on the
// row, by the swizzle of the format (`turned`), so that pieces that are read together lie in
// different banks.
template <class W>
struct WeightTile {
  char* bytes;

  __device__ __forceinline__ char* piece(int row, int i) const {
    return bytes + row * kChunkBytes + 16 * (i ^ W::turned(row));
  }
};

// The swizzle of formats that read the same piece of 8 rows together, or 4 pieces of 2 neighbouring
// rows.
struct Pieces {
  static __device__ __forceinline__ int turned(int row) { return (row & 1) << 2 | (row >> 1 & 3); }
};

// The operands of a step: two products of 16 rows with 16 values each.
using StepOperands = uint32_t[2][4];

// Arranges the lane's 4 pairs of row lane / 4 (top) and of the row 8 below (bottom).
__device__ __forceinline__ void arrange(StepOperands& a, const uint32_t* top,
                                        const uint32_t* bottom) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i][0] = top[2 * i];
    a[i][1] = bottom[2 * i];
    a[i][2] = top[2 * i + 1];
    a[i][3] = bottom[2 * i + 1];
  }
}

// a - b, of each of the two numbers in a register.
template <class T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(static_cast<void*>(&x), &a, sizeof a);
  memcpy(static_cast<void*>(&y), &b, sizeof b);
  x = __hsub2(x, y);
  memcpy(&a, &x, sizeof a);
  return a;
}

// Widens 4 bytes, the lowest first, to 2 pairs.
template <class T>
__device__ __forceinline__ void widen_int8(uint32_t word, uint32_t* pairs) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      // 1024 + (v + 128) - 1152
      const uint32_t offset = word ^ 0x80808080u;
      pairs[i] = subtract_pairs<T>(__byte_perm(offset, 0x64646464u, i == 0 ? 0x4140 : 0x4342),
                                   0x64806480u);
    } else {
      // The mantissa has room for 7 bits: 128 + the low 7 bits, minus 128 or, if v < 0, minus 256.
      const uint32_t bytes = __byte_perm(word, 0u, i == 0 ? 0x4140 : 0x4342);
      pairs[i] = subtract_pairs<T>(and_xor(bytes, 0x007f007fu, 0x43004300u),
                                   and_xor(bytes, 0x00800080u, 0x43004300u));
    }
  }
}

// Widens 8 values, in the order of int4_shift, to 4 pairs.
template <class T>
__device__ __forceinline__ void widen_int4(uint32_t word, uint32_t* pairs) {
  // 1024 or 128, plus 8, by which two's complement with an inverted sign bit is too large
  constexpr uint32_t kOffset = std::is_same_v<T, __half> ? 0x64086408u : 0x43084308u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = subtract_pairs<T>(and_xor(word >> 4 * i, 0x000f000fu, kOffset), kOffset);
  }
}

// The traits of a format. `take` loads a unit of 1 or 2 steps from shared memory. A scale belongs
// to a whole row (kRowScaled), or to a group of 2^group_log2 values, a whole number of steps
// (kGrouped).

template <class T>
struct PlainWeights : Pieces {
  using Element = T;
  using Scale = void;
  static constexpr bool kRowScaled = false, kGrouped = false;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return 2 * values; }
  static constexpr int kValues = 64;  // of a chunk
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 1;
  // The bytes by which a row of x in shared memory is longer than a multiple of 128. The 16-byte
  // reads at k_at of 4 lanes, and of the 4 lanes of the next token, are then in different banks.
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[1], WeightTile<PlainWeights> tile,
                                              int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    const uint4 top = ld_shared_16(tile.piece(row, 4 * unit + column));
    const uint4 bottom = ld_shared_16(tile.piece(row + 8, 4 * unit + column));
    const uint32_t words[2][4] = {{top.x, top.y, top.z, top.w},
                                  {bottom.x, bottom.y, bottom.z, bottom.w}};
    arrange(a[0], words[0], words[1]);
  }
};

template <class T>
struct Int8Weights : Pieces {
  using Element = T;
  using Scale = bf16;
  static constexpr bool kRowScaled = true, kGrouped = false;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values; }
  static constexpr int kValues = 128;
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 2;
  static constexpr int kRowPadding = 16;

  // The 16 neighbours of a lane are for two steps.
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 64 * (step / 2) + 16 * column + 8 * (step % 2);
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[2], WeightTile<Int8Weights> tile,
                                              int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    const uint4 top = ld_shared_16(tile.piece(row, 4 * unit + column));
    const uint4 bottom = ld_shared_16(tile.piece(row + 8, 4 * unit + column));
    const uint32_t words[2][4] = {{top.x, top.y, top.z, top.w},
                                  {bottom.x, bottom.y, bottom.z, bottom.w}};
    uint32_t pairs[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) widen_int8<T>(words[half][i], pairs[half] + 2 * i);
    }
    arrange(a[0], pairs[0], pairs[1]);
    arrange(a[1], pairs[0] + 4, pairs[1] + 4);
  }
};

template <class T>
struct Int4Weights : Pieces {
  using Element = T;
  using Scale = bf16;
  static constexpr bool kRowScaled = false, kGrouped = true;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values / 2; }
  static constexpr int kValues = 256;
  static constexpr int kUnits = 4;
  static constexpr int kUnitSteps = 2;
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int group_log2(const LinearParams& p) {
    return 31 - __clz(static_cast<int>(p.parts[0].group));
  }
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  // The values of a lane in a step are one word, and ldmatrix gives each lane a word. (A step of 32
  // values lies in one group.)
  static __device__ __forceinline__ void take(StepOperands (&a)[2], WeightTile<Int4Weights> tile,
                                              int unit) {
    const int matrix = threadIdx.x % kWarp / 8, row = threadIdx.x % 8;
    uint32_t words[4];
    ldmatrix_x4(words, tile.piece(row + 8 * (matrix % 2), 2 * unit + matrix / 2));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t pairs[2][4];
      widen_int4<T>(words[2 * step], pairs[0]);
      widen_int4<T>(words[2 * step + 1], pairs[1]);
      arrange(a[step], pairs[0], pairs[1]);
    }
  }
};

template <class T>
struct Q8Weights {
  using Element = T;
  using Scale = __half;
  static constexpr bool kRowScaled = false, kGrouped = true;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values; }
  static constexpr int kValues = 128;
  static constexpr int kUnits = 4;
  static constexpr int kUnitSteps = 1;
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int group_log2(const LinearParams&) { return 5; }
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  // The swizzle: 2 pieces of 4 neighbouring rows are read together.
  static __device__ __forceinline__ int turned(int row) { return 2 * (row & 3); }
  // A step is a group, of which a lane has half a piece.
  static __device__ __forceinline__ void take(StepOperands (&a)[1], WeightTile<Q8Weights> tile,
                                              int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    uint32_t pairs[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char* const piece = tile.piece(row + 8 * half, 2 * unit + column / 2);
      const uint2 words = ld_shared_8(piece + 8 * (column % 2));
      widen_int8<T>(words.x, pairs[half]);
      widen_int8<T>(words.y, pairs[half] + 2);
    }
    arrange(a[0], pairs[0], pairs[1]);
  }
};

// The traits of a format.
template <WeightFormat format, class T>
struct WeightsOf;
template <class T>
struct WeightsOf<WeightFormat::plain, T> {
  using type = PlainWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::int8, T> {
  using type = Int8Weights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::int4, T> {
  using type = Int4Weights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q8_0, T> {
  using type = Q8Weights<T>;
};

}  // namespace mistral::cuda

// Weights of each format from shared memory to the operand of m16n8k16, the widening included.
//
// A chunk is 128 bytes of a row: a cache line, 64, 128 or 256 values. A dot product does not care
// about the order of k, so a lane multiplies neighbouring values that lie in one register or 16
// bytes as they are stored: in every step of 32 values of k it has 8 neighbours, those from k_at
// on, of two rows of the weights and, in the same order, of each token.
//
// Values of 8 and 4 bits become floating-point numbers without a table or a conversion: their bits
// are put below a power of two, in a mantissa whose unit is 1, and the power is subtracted, which
// is exact. Their scales are applied to the sums, in fp32.
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

// A chunk of 16 rows in shared memory. Piece i (16 bytes) of a row is kept in a place that depends
// on the row, so that neither the same piece of 8 rows nor 4 pieces of 2 neighbours collide.
struct WeightTile {
  char* bytes;

  __device__ __forceinline__ char* piece(int row, int i) const {
    const int turned = (row & 1) << 2 | (row >> 1 & 3);
    return bytes + row * kChunkBytes + 16 * (i ^ turned);
  }
};

// The operands of a step: two products of 16 rows with 16 values each.
using StepOperands = uint32_t[2][4];

// From the lane's 4 pairs of the row lane / 4 and of the row 8 below.
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

// Both halves of a register.
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

// 4 bytes, first the lowest, to 2 pairs.
template <class T>
__device__ __forceinline__ void widen_int8(uint32_t word, uint32_t* pairs) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      // 1024 + (v + 128), less 1152
      const uint32_t offset = word ^ 0x80808080u;
      pairs[i] = subtract_pairs<T>(__byte_perm(offset, 0x64646464u, i == 0 ? 0x4140 : 0x4342),
                                   0x64806480u);
    } else {
      // The mantissa has room for 7 bits: 128 + the low ones, less 128 or, if v < 0, 256.
      const uint32_t bytes = __byte_perm(word, 0u, i == 0 ? 0x4140 : 0x4342);
      pairs[i] = subtract_pairs<T>(and_xor(bytes, 0x007f007fu, 0x43004300u),
                                   and_xor(bytes, 0x00800080u, 0x43004300u));
    }
  }
}

// 8 values as int4_shift has them to 4 pairs.
template <class T>
__device__ __forceinline__ void widen_int4(uint32_t word, uint32_t* pairs) {
  // 1024 or 128, and 8, which two's complement with its sign bit inverted is too large by
  constexpr uint32_t kOffset = std::is_same_v<T, __half> ? 0x64086408u : 0x43084308u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = subtract_pairs<T>(and_xor(word >> 4 * i, 0x000f000fu, kOffset), kOffset);
  }
}

// A format takes a unit of 1 or 2 steps from shared memory at a time.

template <class T>
struct PlainWeights {
  using Element = T;
  static constexpr WeightFormat kFormat = WeightFormat::plain;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return 2 * values; }
  static constexpr int kValues = 64;  // of a chunk
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 1;
  // A row of x in shared memory is longer by this than a multiple of 128 bytes: so 4 lanes' 16
  // bytes at k_at, and those 4 of the next token, are in different banks.
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[1], WeightTile tile, int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    const uint4 top = ld_shared_16(tile.piece(row, 4 * unit + column));
    const uint4 bottom = ld_shared_16(tile.piece(row + 8, 4 * unit + column));
    const uint32_t words[2][4] = {{top.x, top.y, top.z, top.w},
                                  {bottom.x, bottom.y, bottom.z, bottom.w}};
    arrange(a[0], words[0], words[1]);
  }
};

template <class T>
struct Int8Weights {
  using Element = T;
  static constexpr WeightFormat kFormat = WeightFormat::int8;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values; }
  static constexpr int kValues = 128;
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 2;
  static constexpr int kRowPadding = 16;

  // 16 neighbours of a lane's are for two steps.
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 64 * (step / 2) + 16 * column + 8 * (step % 2);
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[2], WeightTile tile, int unit) {
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
struct Int4Weights {
  using Element = T;
  static constexpr WeightFormat kFormat = WeightFormat::int4;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values / 2; }
  static constexpr int kValues = 256;
  static constexpr int kUnits = 4;
  static constexpr int kUnitSteps = 2;
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  // A lane's values of a step are a word: ldmatrix deals out words. (A step of 32 values is then
  // never of two groups.)
  static __device__ __forceinline__ void take(StepOperands (&a)[2], WeightTile tile, int unit) {
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

}  // namespace mistral::cuda

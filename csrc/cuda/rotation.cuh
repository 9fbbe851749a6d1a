// The arithmetic of RoPE. rope, rotate and linear_rope share it, so they give the same bits.
#pragma once

#include <cmath>

#include "common/element.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {

// Converts a frequency, in radians per position, to a 64-bit fraction of a turn: the number n
// stands for n / 2^64 turns. The product of this number and a position is the angle of the
// position. The product is computed in 64 bits that wrap around, so it loses only whole turns, and
// is otherwise exact for every position.
__device__ __forceinline__ uint64_t turns_per_position(double radians) {
  // 1 / (2 pi) as the sum of two doubles. One double would not be exact to 2^-64 of a turn.
  constexpr double kInverse = 0x1.45f306dc9c883p-3, kInverseRest = -0x1.6b01ec5417056p-57;
  const double turns = radians * kInverse;
  const double rest = fma(radians, kInverse, -turns) + radians * kInverseRest;
  // The fraction of a turn may round to 1. Times 2^64, this would not fit 64 bits. Times 2^63 it
  // does, and the shift turns it into 0, which is the same angle.
  const auto fraction = static_cast<uint64_t>((turns - floor(turns)) * 0x1p63) << 1;
  return fraction + static_cast<uint64_t>(static_cast<int64_t>(rest * 0x1p64));
}

// The cosine and sine of an angle, which is a 64-bit fraction of a turn.
__device__ __forceinline__ float2 cosine_and_sine(uint64_t turns) {
  // Splits the angle into the nearest multiple of a quarter turn and a rest of at most an eighth of
  // a turn. The rest is exact until it is rounded to a float, so even a sine or cosine near 0 has
  // about the precision of a float.
  const uint64_t quarter = (turns + (uint64_t{1} << 61)) >> 62;
  const auto rest = static_cast<int64_t>(turns - (quarter << 62));
  float sine, cosine;
  sincospif(static_cast<float>(rest) * 0x1p-63f, &sine, &cosine);
  const bool odd = quarter & 1;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  return {quarter == 1 || quarter == 2 ? -c : c, quarter == 2 || quarter == 3 ? -s : s};
}

// Rotates a pair by the angle whose cosine and sine are turn.x and turn.y. The fused multiply-adds
// are explicit. Otherwise the compiler could fuse different products in different kernels, and the
// kernels would not give the same bits.
__device__ __forceinline__ float2 rotate_pair(float first, float second, float2 turn) {
  return {fmaf(first, turn.x, -(second * turn.y)), fmaf(second, turn.x, first * turn.y)};
}

// Rotates N pairs: element j of `first` and of `second` by turn[j].
template <class T, int N>
__device__ __forceinline__ void rotate_pairs(Vec<T, N>& first, Vec<T, N>& second,
                                             const float2* turn) {
  float a[N], b[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float2 rotated = rotate_pair(first[j], second[j], turn[j]);
    a[j] = rotated.x;
    b[j] = rotated.y;
  }
  first = round_to<T>(a);
  second = round_to<T>(b);
}

}  // namespace mistral::cuda

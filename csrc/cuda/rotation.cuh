// The arithmetic of RoPE: rope and the product of query, key and value with rope behind it give the
// same to the bit.
#pragma once

#include <cmath>

#include "../common.h"
#include "element.cuh"

namespace mistral::cuda {

// The angle per position, in turns, as a 64-bit fraction: what a position's angle has beyond whole
// turns is then position * fraction in plain unsigned arithmetic. That is exact, however far the
// position, and no thread needs a double.
struct Frequencies {
  uint64_t turns[kMaxHeadDim / 2];
};

inline Frequencies frequencies(double theta, int64_t half) {
  constexpr long double kTwoPi = 6.283185307179586476925286766559L;
  Frequencies f{};
  for (int64_t i = 0; i < half; ++i) {
    const double angle = pow(theta, -static_cast<double>(i) / static_cast<double>(half));
    const long double turns = static_cast<long double>(angle) / kTwoPi;
    // 2^64 itself would not fit, but to it rounds only what is within 2^-65 of a whole turn.
    f.turns[i] = static_cast<uint64_t>(ldexpl(turns - floorl(turns), 64));
  }
  return f;
}

// Cosine and sine of an angle that is a 64-bit fraction of a turn.
__device__ __forceinline__ float2 cosine_and_sine(uint64_t turns) {
  // The nearest quarter turn, and the rest of at most an eighth, of which a float keeps 24 bits.
  const uint64_t quarter = (turns + (uint64_t{1} << 61)) >> 62;
  const auto rest = static_cast<int64_t>(turns - (quarter << 62));
  float sine, cosine;
  sincospif(static_cast<float>(rest) * 0x1p-63f, &sine, &cosine);
  const bool odd = quarter & 1;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  return {quarter == 1 || quarter == 2 ? -c : c, quarter == 2 || quarter == 3 ? -s : s};
}

// A pair, turned. Which product is fused with the sum is said here: left to the compiler, it could
// be another one in another kernel.
__device__ __forceinline__ float2 rotate_pair(float first, float second, float2 turn) {
  return {fmaf(first, turn.x, -(second * turn.y)), fmaf(second, turn.x, first * turn.y)};
}

}  // namespace mistral::cuda

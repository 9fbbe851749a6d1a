// Reads the scales of groups in the layouts of the formats (csrc/formats.h). There is a type for
// each layout. Its constructor takes the address of the scales, in shared memory or in a local
// array. `next(i)` returns a Scaling. PlainScales and PairedScales ignore i, and return the Scaling
// of one group after another. So callers must go in the order of the values. In the other types, a
// group has 256 values and several Scalings, and `next(i)` returns number i.
#pragma once

#include <cstdint>

#include "../../formats.h"
#include "../common/element.cuh"

namespace mistral::cuda {

// A weight is factor * q + offset, where q is the number to which widen.cuh widens the stored
// value. If kOffset is false, the offset is 0.
struct Scaling {
  float factor;
  float offset;
};

// Converts the lower (i = 0) or the upper (i = 1) fp16 number of a word to float.
__device__ __forceinline__ float half_of(uint32_t word, int i) {
  const auto bits = static_cast<uint16_t>(word >> 16 * i);
  __half half;
  memcpy(static_cast<void*>(&half), &bits, sizeof half);
  return to_float(half);
}

// Converts a number from 0 to 2^23 - 1 to float. The number becomes the low mantissa bits of 2^23,
// which is then subtracted.
__device__ __forceinline__ float small_float(uint32_t number) {
  return __uint_as_float(number | 0x4b000000u) - 8388608.0f;
}
// Converts byte i of a word to float in the same way.
__device__ __forceinline__ float byte_float(uint32_t word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650u | i)) - 8388608.0f;
}

struct NoScales {
  using Unit = char;
  static constexpr int kUnits = 0;
};

// The scales of int4, q8_0, q4_0 and iq4_nl, and of int8, where the group is a row.
template <class Scale>
struct PlainScales {
  using Unit = Scale;               // the type in which scales are loaded from memory
  static constexpr int kUnits = 1;  // the number of such loads for a group
  static constexpr bool kOffset = false;
  const Scale* scale;

  PlainScales() = default;
  __device__ __forceinline__ explicit PlainScales(const void* group)
      : scale(static_cast<const Scale*>(group)) {}
  __device__ __forceinline__ Scaling next(int) { return {to_float(*scale++), 0.0f}; }
};

// The scales of q4_1, which has a minimum, and of q4_z, which has a zero point.
template <bool kZeroPoint>
struct PairedScales {
  using Unit = uint32_t;
  static constexpr int kUnits = 1;
  static constexpr bool kOffset = true;
  const uint32_t* pair;

  PairedScales() = default;
  __device__ __forceinline__ explicit PairedScales(const void* group)
      : pair(static_cast<const uint32_t*>(group)) {}
  __device__ __forceinline__ Scaling next(int) {
    const uint32_t word = *pair++;
    const float d = half_of(word, 0), second = half_of(word, 1);
    return {d, kZeroPoint ? -d * second : second};
  }
};

// The scales of q4_k and q5_k. A Scaling serves 32 values. packed_scales
// (cpu/linear/unpack_words.h) describes the 6-bit numbers.
struct SixBitScales {
  using Unit = uint32_t;
  static constexpr int kUnits = 4;
  static constexpr bool kOffset = true;
  float d, e;
  uint32_t scales[2], minima[2];  // a byte for each 32 of the 256 values

  SixBitScales() = default;
  __device__ __forceinline__ explicit SixBitScales(const void* group) {
    const auto* const words = static_cast<const uint32_t*>(group);
    d = half_of(words[0], 0);
    e = -half_of(words[0], 1);
    scales[0] = words[1] & 0x3f3f3f3fu;
    minima[0] = words[2] & 0x3f3f3f3fu;
    scales[1] = (words[3] & 0x0f0f0f0fu) | (words[1] >> 2 & 0x30303030u);
    minima[1] = (words[3] >> 4 & 0x0f0f0f0fu) | (words[2] >> 2 & 0x30303030u);
  }
  __device__ __forceinline__ Scaling next(int i) const {
    return {d * byte_float(i < 4 ? scales[0] : scales[1], i % 4),
            e * byte_float(i < 4 ? minima[0] : minima[1], i % 4)};
  }
};

// The scales of q6_k. A Scaling serves 16 values.
struct ByteScales {
  using Unit = uint32_t;
  static constexpr int kUnits = 5;
  static constexpr bool kOffset = false;
  const uint32_t* words;
  float d;

  ByteScales() = default;
  __device__ __forceinline__ explicit ByteScales(const void* group)
      : words(static_cast<const uint32_t*>(group)), d(half_of(words[4], 0)) {}
  __device__ __forceinline__ Scaling next(int i) const {
    // With the sign bit inverted, the unsigned byte is 128 more than the signed number.
    const float scale = byte_float(words[i / 4] ^ 0x80808080u, i % 4) - 128.0f;
    return {d * scale, 0.0f};
  }
};

// The scales of iq4_xs. A Scaling serves 32 values.
struct SplitScales {
  using Unit = uint32_t;
  static constexpr int kUnits = 2;
  static constexpr bool kOffset = false;
  float d;
  uint32_t high, low;

  SplitScales() = default;
  __device__ __forceinline__ explicit SplitScales(const void* group) {
    const auto* const words = static_cast<const uint32_t*>(group);
    d = half_of(words[0], 0);
    high = words[0] >> 16;
    low = words[1];
  }
  __device__ __forceinline__ Scaling next(int i) const {
    const uint32_t scale = (low >> 4 * i & 15u) | (high >> 2 * i << 4 & 0x30u);
    return {d * (small_float(scale) - 32.0f), 0.0f};
  }
};

// The number of bytes of the scales of a group.
template <class Scales>
constexpr int kGroupBytes = Scales::kUnits * static_cast<int>(sizeof(typename Scales::Unit));

}  // namespace mistral::cuda

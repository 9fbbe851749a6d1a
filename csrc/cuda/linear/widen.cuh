// Widens integers of 4 to 8 bits to pairs of bf16 or fp16, without a conversion instruction. An
// integer is put into the low mantissa bits of a power of two. The power is chosen so that the
// lowest bit of its mantissa counts 1. Then the power is subtracted, which is exact. Scales are
// applied later to the sums, in fp32 (scales.cuh).
#pragma once

#include <ptx.cuh>

#include <type_traits>

#include "../../formats.h"
#include "../common/element.cuh"

namespace mistral::cuda {

// a - b for each of the two numbers in a register.
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

// Widens 4 signed bytes to 2 pairs. The lowest byte comes first.
template <class T>
__device__ __forceinline__ void widen_int8(uint32_t word, uint32_t* pairs) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      // Byte v becomes 1024 + (v + 128). Subtracting 1152 leaves v.
      const uint32_t offset = word ^ 0x80808080u;
      pairs[i] = subtract_pairs<T>(__byte_perm(offset, 0x64646464u, i == 0 ? 0x4140 : 0x4342),
                                   0x64806480u);
    } else {
      // The mantissa has only 7 bits. So byte v becomes 128 + (its low 7 bits), minus 128 if v >= 0
      // or 256 if v < 0.
      const uint32_t bytes = __byte_perm(word, 0u, i == 0 ? 0x4140 : 0x4342);
      pairs[i] = subtract_pairs<T>(and_xor(bytes, 0x007f007fu, 0x43004300u),
                                   and_xor(bytes, 0x00800080u, 0x43004300u));
    }
  }
}

// Widens the two 4-bit values in bits 0 to 3 and 16 to 19 of `pair`, and subtracts kLess from each.
// `flipped` is a mask of the bits that are inverted first. If values have more than 4 bits,
// `further` has their other bits, from bit 4 and from bit 20 on.
template <class T, int kLess>
__device__ __forceinline__ uint32_t widen_pair(uint32_t pair, uint32_t flipped = 0,
                                               uint32_t further = 0) {
  constexpr uint32_t kPower = std::is_same_v<T, __half> ? 0x64006400u   // 1024, twice
                                                        : 0x43004300u;  // 128, twice
  return subtract_pairs<T>(and_xor(pair, 0x000f000fu, kPower ^ flipped) | further,
                           kPower + kLess * 0x00010001u);
}

// ---- These structs widen a word (csrc/formats.h) to 4 pairs, in the order of the values.

// Words of signed values.
struct SignedWords {
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // With the sign bit inverted, the unsigned number is 8 more than the signed value.
      pairs[i] = widen_pair<T, 8>(word >> 4 * i, 0x00080008u);
    }
  }
};

// Words of unsigned values.
struct UnsignedWords {
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = widen_pair<T, 0>(word >> 4 * i);
  }
};

// Elements first to first + 3 of kTable4, as the bytes of a word. Element `first` is in the lowest
// byte.
constexpr uint32_t table_entries(int first) {
  uint32_t word = 0;
  for (int i = 3; i >= 0; --i) word = word << 8 | static_cast<uint8_t>(kTable4[first + i]);
  return word;
}

// Words of indices into kTable4.
struct TableWords {
  static constexpr uint32_t k0 = table_entries(0), k4 = table_entries(4), k8 = table_entries(8),
                            k12 = table_entries(12);

  // Looks up the 4 indices in the low half of a word. Returns the elements as the bytes of a word.
  // A __byte_perm can choose among 8 bytes only. So the first two look up the low 3 bits of the
  // indices, each in one half of the table. The third chooses between their results by the high
  // bits of the indices.
  static __device__ __forceinline__ uint32_t look_up(uint32_t indices) {
    const uint32_t low_bits = indices & 0x7777u;
    const uint32_t first = __byte_perm(k0, k4, low_bits), second = __byte_perm(k8, k12, low_bits);
    return __byte_perm(first, second, (indices >> 1 & 0x4444u) | 0x3210u);
  }
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t* pairs) {
    const uint32_t even = look_up(word), odd = look_up(word >> 16);
    widen_int8<T>(__byte_perm(even, odd, 0x5140), pairs);
    widen_int8<T>(__byte_perm(even, odd, 0x7362), pairs + 2);
  }
};

// Words of q5_k. `further` is the word that holds the fifth bits (csrc/formats.h), shifted so that
// its lowest bit is the fifth bit of the first value.
struct FiveBits {
  template <class T>
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t further, uint32_t* pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t fifth = further >> fifth_bit_shift(0, 4 * i) << 4 & 0x00100010u;
      pairs[i] = widen_pair<T, 0>(word >> 4 * i, 0, fifth);
    }
  }
};

// Words of q6_k, with the two high bits of each value. Widens the lowest kCount pairs of `word`: 4
// for a word, or 2 for half a word. `further` is the further word (csrc/formats.h), shifted so that
// its lowest bits are the high bits of the first of these values. Stored values are 32 too large,
// so 32 is subtracted.
struct SixBits {
  template <class T, int kCount>
  static __device__ __forceinline__ void widen(uint32_t word, uint32_t further, uint32_t* pairs) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t high = further >> high_bits_shift(0, 4 * i) << 4 & 0x00300030u;
      pairs[i] = widen_pair<T, 32>(word >> 4 * i, 0, high);
    }
  }
};

}  // namespace mistral::cuda

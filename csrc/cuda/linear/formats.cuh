// Loads weights of each format from shared memory, widens them (widen.cuh), and arranges them as
// operands of m16n8k16, the instruction of the tensor cores (ptx.cuh).
//
// A chunk is 128 bytes of a row, the size of a cache line. It holds 64, 128 or 256 values. A step
// multiplies 32 values of each row: two products (m16n8k16) of 16 values. In a step a lane has two
// rows of the weight, and 8 neighbouring values of each row, from index k_at on (in q6_k, two times
// 4 values). In the order of m16n8k16 itself, the pairs of a lane lie apart. But a dot product may
// be summed in any order, if weights and activations have the same order. So a lane uses the values
// as they are stored, and takes the activations with the same indices.
#pragma once

#include <ptx.cuh>

#include "../../linear.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "scales.cuh"
#include "widen.cuh"

namespace mistral::cuda {

constexpr int kChunkBytes = 128;
constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * kChunkBytes;

// A tile in shared memory: a chunk of each of 16 rows, and behind the chunks the further bits of
// these rows (the bits above the lowest four, in q5_k and q6_k). A row consists of pieces of 16
// bytes. Their order changes from row to row (a swizzle), so that pieces that are read together lie
// in different banks. Pieces of further bits have an order of their own, because lanes read a
// single word of them in each of 8 rows at once.
template <class W>
struct WeightTile {
  static constexpr int kBytes = kTileBytes + kTileRows * W::kFurtherBytes;
  char* bytes;

  __device__ __forceinline__ char* piece(int row, int i) const {
    return bytes + row * kChunkBytes + 16 * (i ^ W::turned(row));
  }
  __device__ __forceinline__ char* further_piece(int row, int i) const {
    constexpr int kPieces = W::kFurtherBytes / 16;
    const int turned = row * kPieces / 8 % kPieces;
    return bytes + kTileBytes + row * W::kFurtherBytes + 16 * (i ^ turned);
  }
  __device__ __forceinline__ uint32_t further_word(int row, int i) const {
    return *reinterpret_cast<const uint32_t*>(further_piece(row, i / 4) + 4 * (i % 4));
  }
};

// The traits that most formats share.
struct Common {
  using Scales = NoScales;
  static constexpr bool kRowScaled = false, kGrouped = false;
  static constexpr bool kOffset = false;     // whether a Scaling (scales.cuh) has an offset
  static constexpr bool kHalfSteps = false;  // whether a Scaling serves only 16 values, half a step
  static constexpr int kLeastGroup = 32;     // the size of the smallest group, with kGrouped
  static constexpr int kFurtherBytes = 0;    // bytes of further bits in a chunk of one row
  // The index of a piece is XORed with this number. The number here is for formats that read the
  // same piece of 8 rows together, or 4 pieces of each of 2 neighbouring rows.
  static __device__ __forceinline__ int turned(int row) { return (row & 1) << 2 | (row >> 1 & 3); }
};

// The operands of the two products of a step. Each product takes 16 values of 16 rows.
using StepOperands = uint32_t[2][4];

// Arranges a lane's 8 values of row lane / 4 (top) and of row lane / 4 + 8 (bottom) as operands.
// `top` and `bottom` are 4 pairs each.
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

// The traits of a format:
//   bytes(n)     the bytes of n values in global memory
//   kValues      the number of values in a chunk
//   take         loads the operands of one or two steps (a unit) from shared memory. A chunk has
//                kUnits units of kUnitSteps steps.
//   k_at         the index in the chunk of a lane's first value in a step. `column` is lane % 4.
//   kRowPadding  see PlainWeights
//
// With kRowScaled, a row has one scale. With kGrouped, each group of 2^group_log2 values of a row
// has kGroupBytes<Scales> bytes of scales in memory. Scales (scales.cuh) turns them into Scalings,
// each a factor and an offset. A Scaling serves 2^scaled_log2 values: the whole group or a part of
// it. That is a whole number of steps, or half a step.

template <class T>
struct PlainWeights : Common {
  using Element = T;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return 2 * values; }
  static constexpr int kValues = 64;
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 1;
  // In shared memory, a row of x takes a multiple of 128 bytes, and this many bytes of padding
  // follow. In a step, 4 lanes read 16 bytes each of one token's row, and the next 4 lanes 16 bytes
  // each of the next token's row. The padding puts these reads into different banks.
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
struct Int8Weights : Common {
  using Element = T;
  using Scales = PlainScales<bf16>;
  static constexpr bool kRowScaled = true;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values; }
  static constexpr int kValues = 128;
  static constexpr int kUnits = 2;
  static constexpr int kUnitSteps = 2;
  // 4 lanes read 16 bytes each of one token's row, 32 bytes apart. With this padding, the reads of
  // the next 4 lanes fall into the banks in between.
  static constexpr int kRowPadding = 16;

  // A lane takes 16 neighbouring values, 8 for each of two steps.
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
struct Q8Weights : Common {
  using Element = T;
  using Scales = PlainScales<__half>;
  static constexpr bool kGrouped = true;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values; }
  static constexpr int kValues = 128;
  static constexpr int kUnits = 4;
  static constexpr int kUnitSteps = 1;
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int group_log2(const LinearParams&) { return 5; }
  static __device__ __forceinline__ int scaled_log2(const LinearParams&) { return 5; }
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  // For reads of 2 pieces of each of 4 neighbouring rows together.
  static __device__ __forceinline__ int turned(int row) { return 2 * (row & 3); }
  // A step has the 32 values of a group. A lane takes half of a 16-byte piece.
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

// The formats of words (csrc/formats.h). `Words` widens words. `Scales_` is the type of the scales.
// kGroup is the size of a group, or 0 if it differs from weight to weight (WeightPart::group).
template <class T, class Words, class Scales_, int kGroup>
struct WordWeights : Common {
  using Element = T;
  using Scales = Scales_;
  static constexpr bool kGrouped = true, kOffset = Scales::kOffset;
  static constexpr int kLeastGroup = kGroup == 0 ? 32 : kGroup;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values / 2; }
  static constexpr int kValues = 256;
  static constexpr int kUnits = 4;
  static constexpr int kUnitSteps = 2;
  static constexpr int kRowPadding = 64;

  static __device__ __forceinline__ int group_log2(const LinearParams& p) {
    if constexpr (kGroup == 0) {
      return 31 - __clz(static_cast<int>(p.parts[0].group));
    } else {
      return kGroup == 32 ? 5 : 8;
    }
  }
  static __device__ __forceinline__ int scaled_log2(const LinearParams& p) {
    return kGroup == 256 ? 5 : group_log2(p);
  }
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 8 * column;
  }
  // In a step, a lane needs one word of each of its two rows. One ldmatrix gives it the words of
  // two steps. Matrices 0 and 1 hold the words of the first step, for the upper and the lower 8
  // rows. Matrices 2 and 3 hold those of the second step.
  template <class Tile>
  static __device__ __forceinline__ void take_words(uint32_t (&words)[4], Tile tile, int unit) {
    const int matrix = threadIdx.x % kWarp / 8, row = threadIdx.x % 8;
    ldmatrix_x4(words, tile.piece(row + 8 * (matrix % 2), 2 * unit + matrix / 2));
  }
  // Widens word i of a row in global memory.
  static __device__ __forceinline__ void widen_word(const uint32_t* row, int i, uint32_t* pairs) {
    Words::template widen<T>(load_global(row + i), pairs);
  }
  template <class Tile>
  static __device__ __forceinline__ void take(StepOperands (&a)[2], Tile tile, int unit) {
    uint32_t words[4];
    take_words(words, tile, unit);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t pairs[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Words::template widen<T>(words[2 * step + half], pairs[half]);
      }
      arrange(a[step], pairs[0], pairs[1]);
    }
  }
};

template <class T>
struct Int4Weights : WordWeights<T, SignedWords, PlainScales<bf16>, 0> {};
template <class T>
struct Q4_0Weights : WordWeights<T, SignedWords, PlainScales<__half>, 0> {};
template <class T>
struct Q4_1Weights : WordWeights<T, UnsignedWords, PairedScales<false>, 32> {};
template <class T>
struct Q4ZWeights : WordWeights<T, UnsignedWords, PairedScales<true>, 0> {};
template <class T>
struct Q4KWeights : WordWeights<T, UnsignedWords, SixBitScales, 256> {};
template <class T>
struct IQ4NLWeights : WordWeights<T, TableWords, PlainScales<__half>, 32> {};
template <class T>
struct IQ4XSWeights : WordWeights<T, TableWords, SplitScales, 256> {};

template <class T>
struct Q5KWeights : WordWeights<T, FiveBits, SixBitScales, 256> {
  using Base = WordWeights<T, FiveBits, SixBitScales, 256>;
  static constexpr int kFurtherBytes = 32;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values / 32 * 20; }

  static __device__ __forceinline__ void widen_word(const uint32_t* row, int i, uint32_t* pairs) {
    const uint32_t* const words = row + i / 32 * 40;
    const uint32_t further = load_global(words + 32 + i % 32 / 4);
    FiveBits::widen<T>(load_global(words + i % 32), further >> fifth_bit_shift(i % 4, 0), pairs);
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[2], WeightTile<Q5KWeights> tile,
                                              int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    uint32_t words[4];
    Base::take_words(words, tile, unit);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t pairs[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t further = tile.further_word(row + 8 * half, 2 * unit + step);
        FiveBits::widen<T>(words[2 * step + half], further >> fifth_bit_shift(column, 0),
                           pairs[half]);
      }
      arrange(a[step], pairs[0], pairs[1]);
    }
  }
};

// Each of the two products of a step has its own scale. A lane has 4 neighbouring values of each
// row in a product.
template <class T>
struct Q6KWeights : WordWeights<T, SixBits, ByteScales, 256> {
  static constexpr bool kHalfSteps = true;
  static constexpr int kFurtherBytes = 64;
  MISTRAL_HOST_DEVICE static constexpr int64_t bytes(int64_t values) { return values / 32 * 24; }
  static constexpr int kUnits = 8;
  static constexpr int kUnitSteps = 1;
  // Half of that in PlainWeights, because 4 lanes read only 8 bytes each of one token's row.
  static constexpr int kRowPadding = 32;

  static __device__ __forceinline__ int scaled_log2(const LinearParams&) { return 4; }
  // The index of the lane's first value for the first product. Its values for the second product
  // are 16 further.
  static __device__ __forceinline__ int k_at(int step, int column) {
    return 32 * step + 4 * column;
  }
  static __device__ __forceinline__ void widen_word(const uint32_t* row, int i, uint32_t* pairs) {
    const uint32_t* const words = row + i / 32 * 48;
    const uint32_t further = load_global(words + 32 + i % 4 / 2 * 8 + i % 32 / 4);
    SixBits::widen<T, 4>(load_global(words + i % 32), further >> high_bits_shift(i % 4, 0), pairs);
  }
  static __device__ __forceinline__ void take(StepOperands (&a)[1], WeightTile<Q6KWeights> tile,
                                              int unit) {
    const int row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4;
    // The lane's 4 values are the first or the second half of a word.
    const int shift = 8 * (column % 2), word = column / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const char* const piece = tile.piece(row + 8 * half, unit);
        const uint32_t low = reinterpret_cast<const uint32_t*>(piece)[2 * i + word];
        const uint32_t further = tile.further_word(row + 8 * half, 8 * i + unit);
        uint32_t pairs[2];
        SixBits::widen<T, 2>(low >> shift, further >> high_bits_shift(word, shift), pairs);
        a[0][i][half] = pairs[0];
        a[0][i][half + 2] = pairs[1];
      }
    }
  }
};

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
template <class T>
struct WeightsOf<WeightFormat::q4_0, T> {
  using type = Q4_0Weights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q4_1, T> {
  using type = Q4_1Weights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q4_z, T> {
  using type = Q4ZWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q4_k, T> {
  using type = Q4KWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q5_k, T> {
  using type = Q5KWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::q6_k, T> {
  using type = Q6KWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::iq4_nl, T> {
  using type = IQ4NLWeights<T>;
};
template <class T>
struct WeightsOf<WeightFormat::iq4_xs, T> {
  using type = IQ4XSWeights<T>;
};

}  // namespace mistral::cuda

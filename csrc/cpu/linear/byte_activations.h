// Activations rounded to 8 bits. Each block of 32 activations of a token has a unit: its largest
// magnitude / 127. An activation is rounded to a whole number of units, and stored as this number.
// 256 activations are packed together, in the order in which byte_chunk.h multiplies them.
#pragma once

#include "../simd/bytes.h"
#include "../simd/integers.h"
#include "formats.h"
#include "mixed_rows.h"

namespace mistral::cpu::MISTRAL_ISA {

#if defined(__AVX512VNNI__)

using ByteSums = __m512;  // the sums of four rows

// 256 activations for AVX-512 with VNNI, in the order of the weights. A vector of weights has 16
// words: those of blocks 0 to 3 or of blocks 4 to 7, four for each block. Each byte holds two
// weights, one in its low half and one in its high half. These halves are unpacked to two vectors.
struct ByteActivations {
  struct Block {
    float scale;            // the unit of the block
    float sum;              // the sum of the integers, times the unit
    int32_t minus_sums[2];  // -(sum of the first 16 integers), -(sum of the last 16 integers)
  };

  int8_t values[2][2][64];  // [blocks 0-3 or 4-7][low or high halves of bytes][lanes]
  Block blocks[2][4];

  // The place of the 4 activations for the low (half = 0) or the high halves of the bytes of a
  // word.
  int8_t* word(int block, int word, int half) {
    return values[block / 4][half] + (block % 4 * 4 + word) * 4;
  }
  void set_scale(int block, float of_block, int first_sum, int last_sum) {
    const float sum = of_block * static_cast<float>(first_sum + last_sum);
    blocks[block / 4][block % 4] = {of_block, sum, {-first_sum, -last_sum}};
  }
};

#elif defined(MISTRAL_VECTORS)

using ByteSums = Lanes8;

// 256 activations for vectors of 256 bits. Each block has a 32-bit lane (lane_of in ../simd). Four
// words of weights make up a block. Vector 2 w + h of `values` has, in the lane of each block, the
// 4 activations for the low (h = 0) or the high halves of the bytes of its word w.
struct ByteActivations {
  int8_t values[8][32];
  float scale[8];      // the unit of each block, in the order of lanes
  float sum[8];        // the sum of the integers of each block, times its unit
  int16_t halves[16];  // for each lane: the sums of the first and of the last 16 integers
#if defined(__ARM_FEATURE_MATMUL_INT8)
  char unused[32];  // makes two of these as large as a PairActivations
#endif

  int8_t* word(int block, int word, int half) {
    return values[2 * word + half] + 4 * lane_of(block);
  }
  void set_scale(int block, float of_block, int first_sum, int last_sum) {
    const int lane = lane_of(block);
    scale[lane] = of_block;
    sum[lane] = of_block * static_cast<float>(first_sum + last_sum);
    halves[2 * lane] = static_cast<int16_t>(first_sum);
    halves[2 * lane + 1] = static_cast<int16_t>(last_sum);
  }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)

// 256 activations of each of two tokens, for products with i8mm. A block has four parts of 8
// activations. Parts 0 and 1 are for words 0 and 1 of the block of weights, parts 2 and 3 for words
// 2 and 3. Even parts are for the low halves of the bytes of these words, odd parts for the high
// halves.
struct PairActivations {
  int8_t values[8][4][2][8];  // [block][part][token]
  // [block][row][token]. An instruction gives four sums, of two rows of weights and two tokens.
  // Both rows hold the same numbers here, so that one load gives those for all four sums.
  float scale[8][2][2];  // the unit of the block
  float sum[8][2][2];    // the sum of the integers, times the unit
};
// Buffers have room for one ByteActivations for each token and 256 values (packed_byte_row).
static_assert(sizeof(PairActivations) == 2 * sizeof(ByteActivations), "");

// The activations of one token of a pair.
struct OfPair {
  PairActivations& pair;
  int token;

  int8_t* word(int block, int word, int half) {
    return pair.values[block][word / 2 * 2 + half][token] + word % 2 * 4;
  }
  void set_scale(int block, float of_block, int first_sum, int last_sum) {
    for (int row = 0; row < 2; ++row) {
      pair.scale[block][row][token] = of_block;
      pair.sum[block][row][token] = of_block * static_cast<float>(first_sum + last_sum);
    }
  }
};

#endif

// out[i] = the sum of the lanes of x[i].
MISTRAL_SIMD void store_row_sums(const ByteSums (&x)[8], float* out) {
  store_lanes(out, sums_of_lanes(x));
}

#else

struct ByteActivations {};

#endif

// The number of bytes of the packed K activations of a token.
constexpr int64_t packed_byte_row(int64_t inputs) {
  return ceil_div(inputs, kSuperBlock) * int64_t{sizeof(ByteActivations)};
}

#if defined(MISTRAL_VECTORS)

// Rounds 32 activations to multiples of a unit, writes the integers, and returns the unit. The unit
// is 0 if the activations are so small that its inverse could be infinite. It is NaN if an
// activation is not finite. In both cases the integers are 0.
inline float round_block(const float* x, Bytes32* out) {
  const int32_t bits = largest_magnitude(x, 32);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  *out = zero_bytes();
  if (largest <= 0x1p-120f) return 0.0f;
  if (!(largest <= 0x1.fffffep127f)) return NAN;
  *out = round_32(x, 127.0f / largest);
  return largest / 127.0f;
}

// Packs `count` activations, at most kSuperBlock and a multiple of 32, and pads them with zeros to
// kSuperBlock. `packed` is a ByteActivations or an OfPair.
template <class T, class Packed>
void pack_super_block(const T* x, int64_t count, Packed&& packed) {
  float values[kSuperBlock] = {};
  for (int64_t i = 0; i < count; i += Vec::width) store(values + i, load(x + i));
  // A word of weights has 8 values. Value e is at bit int4_shift(e), so four values are in the low
  // halves of the bytes and four in the high halves. The shuffle puts the four activations for each
  // kind of half side by side.
  int8_t places[16];
  for (int i = 0; i < 16; ++i) {
    const int place = i % 4, half = i / 4 % 2;
    places[i] = static_cast<int8_t>(i / 8 * 8 + place % 2 * 4 + place / 2 + 2 * half);
  }
  for (int block = 0; block < 8; ++block) {
    Bytes32 rounded;
    const float scale = round_block(values + 32 * block, &rounded);
    int sums[8];  // the sums of each 4 neighbours
    store_sums_of_fours(sums, rounded);
    packed.set_scale(block, scale, sums[0] + sums[1] + sums[2] + sums[3],
                     sums[4] + sums[5] + sums[6] + sums[7]);
    int32_t fours[8];
    store_32(fours, shuffle_halves(rounded, places));
    for (int i = 0; i < 8; ++i) memcpy(packed.word(block, i / 2, i % 2), &fours[i], 4);
  }
}

// Packs the K activations of a token as ByteActivations.
template <class T>
void pack_bytes(const T* x, int64_t inputs, char* out) {
  auto* packed = reinterpret_cast<ByteActivations*>(out);
  for (int64_t begin = 0; begin < inputs; begin += kSuperBlock) {
    pack_super_block(x + begin, mistral::min(kSuperBlock, inputs - begin), *packed++);
  }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Packs the K activations of token `token` of several. Two tokens share a PairActivations for each
// 256 values. If the last token is alone, zeros take the place of the other one. Pairs of tokens
// lie one after the other.
template <class T>
void pack_bytes_together(const T* x, int64_t inputs, int64_t token, int64_t tokens, char* packed) {
  char* pair = packed + token / 2 * 2 * packed_byte_row(inputs);
  const bool alone = token % 2 == 0 && token + 1 == tokens;
  if (alone) memset(pair, 0, 2 * packed_byte_row(inputs));
  for (int64_t begin = 0; begin < inputs; begin += kSuperBlock) {
    auto* chunk = reinterpret_cast<PairActivations*>(pair);
    pack_super_block(x + begin, mistral::min(kSuperBlock, inputs - begin),
                     OfPair{*chunk, static_cast<int>(token % 2)});
    pair += 2 * sizeof(ByteActivations);
  }
}

#endif

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

// How the linear kernels read weights of each format.
#pragma once

#include "../../linear.h"
#include "../simd/arithmetic.h"

namespace mistral::cpu::MISTRAL_ISA {

// Packed activations are padded with zeros to a multiple of kPadding values. So kernels can
// multiply whole chunks or blocks at the end of a row too, and weights past the end may be any
// finite numbers. kPadding is a multiple of kValues of every chunk in this file.
constexpr int64_t kPadding = mistral::max(64, 8 * Vec::width);
constexpr int64_t padded(int64_t k) { return ceil_div(k, kPadding) * kPadding; }

// Consecutive rows of one part (WeightPart of linear.h) of the weights, in any format.
struct WeightRows {
  WeightFormat format;
  const char* values;
  const char* scales;
  int64_t inputs;       // K
  int64_t bits;         // the number of bits of a value
  int64_t row_bytes;    // the number of bytes of the values of a row
  int64_t scale_bytes;  // the number of bytes of the scales of a row
  int group_log2;       // log2 of the number of values in a group; 0 without groups

  WeightRows from(int64_t row) const {
    WeightRows rows = *this;
    rows.values += row * row_bytes;
    if (scales) rows.scales += row * scale_bytes;
    return rows;
  }
  int64_t bytes(int64_t count) const { return count * bits / 8; }
};

constexpr int64_t kScaleBytes = 2;  // the size of a scale in bf16 or fp16

// The rows of a part from row `first` on. T is the dtype of x.
template <class T>
WeightRows rows_of(const WeightPart& part, int64_t inputs, int64_t first) {
  const FormatInfo& format = info(part.format);
  WeightRows w{};
  w.values = static_cast<const char*>(part.values);
  w.scales = static_cast<const char*>(part.scales);
  w.inputs = inputs;
  w.format = part.format;
  w.bits = format.bits ? format.bits : 8 * int64_t{sizeof(T)};
  w.row_bytes = w.bytes(inputs);
  if (part.scales) {
    w.scale_bytes = inputs / part.group * format.group_scales * format.scale_bytes;
  }
  if (format.least_group) w.group_log2 = __builtin_ctzll(part.group);
  return w.from(first);
}

// Unpacks the scales and minima of 6 bits of a super-block of q4_k or q5_k. `group` points to its
// 16 bytes: the units d and e, then the packed numbers (packed_scales in unpack_words.h). Writes a
// byte for each number: the scales of 8 blocks, then their minima.
MISTRAL_SIMD void six_bit_scales(const char* group, uint32_t (&bytes)[4]) {
  uint32_t packed[4];
  memcpy(packed, group, sizeof packed);
  constexpr uint32_t kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f, kTwo = 0x03030303;
  bytes[0] = packed[1] & kSix;
  bytes[1] = (packed[3] & kFour) | (packed[1] >> 6 & kTwo) << 4;
  bytes[2] = packed[2] & kSix;
  bytes[3] = (packed[3] >> 4 & kFour) | (packed[2] >> 6 & kTwo) << 4;
}

// Unpacks the scales of 6 bits of a super-block of iq4_xs. `group` points to its 8 bytes: the unit
// d, then the packed scales. Returns a byte for each scale: blocks 0, 2, 4, 6, then blocks 1, 3, 5,
// 7. The bytes are 32 larger than the scales.
MISTRAL_SIMD uint64_t split_scales(const char* group) {
  uint32_t low, high = 0;
  memcpy(&high, group + 2, sizeof(uint16_t));
  memcpy(&low, group + 4, sizeof low);
  // Each byte gets the high bits of two neighbouring blocks.
  high = (high | high << 8) & 0x00ff00ff;
  high = (high | high << 4) & 0x0f0f0f0f;
  constexpr uint32_t kFour = 0x0f0f0f0f, kTwo = 0x03030303;
  const uint32_t even = (low & kFour) | (high & kTwo) << 4;
  const uint32_t odd = (low >> 4 & kFour) | (high >> 2 & kTwo) << 4;
  return even | uint64_t{odd} << 32;
}

// A chunk is the piece of a row that gemv.h reads at a time. (gemv_chunks.h describes another kind
// of chunk.) It has kValues values. take(values) sets the address of a chunk. operand(i) unpacks
// some of its values to a vector, the operand of a multiplication. A chunk has kVectors operands.
//
// Operands may hold the values in another order than memory. Position p, counted through the
// operands of a whole row, holds value k_at(p) of the row. Activations are packed in the same
// order. If kInOrder, k_at(p) is p.
//
// If kGrouped, groups of values have scales. Then the class Scales loads the scales of neighbouring
// chunks and gives each lane its factor.

template <class A, class T>
struct PlainChunk {
  using Arithmetic = A;
  static constexpr int64_t kVectors = mistral::max(1, 64 / (kStep<A> * int64_t{sizeof(T)}));
  static constexpr int64_t kValues = kVectors * kStep<A>;
  static constexpr bool kGrouped = false;
  static constexpr bool kInOrder = true;

  static constexpr int64_t bytes(int64_t values) { return values * int64_t{sizeof(T)}; }
  static int64_t k_at(int64_t position) { return position; }

  void take(const char* values) { values_ = reinterpret_cast<const T*>(values); }
  typename A::Operand operand(int64_t i) const { return load_as(values_ + i * kStep<A>, A{}); }

 private:
  static Vec load_as(const T* p, Fp32) { return load(p); }
#if defined(MISTRAL_BF16_PAIRS)
  static Pairs load_as(const bf16* p, Bf16) { return load_pairs(p); }
#endif

  const T* values_;
};

template <class A>
struct Int8Chunk {
  using Arithmetic = A;
  static constexpr int64_t kValues = 64;
  static constexpr int64_t kVectors = kValues / kStep<A>;
  static constexpr bool kGrouped = false;
  static constexpr bool kInOrder = true;

  static constexpr int64_t bytes(int64_t values) { return values; }
  static int64_t k_at(int64_t position) { return position; }

  void take(const char* values) { values_ = reinterpret_cast<const int8_t*>(values); }
  typename A::Operand operand(int64_t i) const {
    Vec x[A::kDepth];
    for (int64_t d = 0; d < A::kDepth; ++d) x[d] = load(values_ + i * kStep<A> + d * Vec::width);
    return A::convert(x);
  }

 private:
  const int8_t* values_;
};

// A chunk is a block of 32 values, so all lanes have the same scale.
template <class A>
struct Q8Chunk : Int8Chunk<A> {
  static constexpr int64_t kValues = 32;
  static constexpr int64_t kVectors = kValues / kStep<A>;
  static constexpr bool kGrouped = true;

  struct Scales {
    using Loaded = const f16*;

    Scales(int, int64_t) {}
    MISTRAL_SIMD Loaded load(const char* scales) const {
      return reinterpret_cast<const f16*>(scales);
    }
    MISTRAL_SIMD Vec of_chunk(Loaded scales, int i) const { return broadcast(scales[i]); }
  };
};

// Each lane of a vector has one word. Operand i holds value i of every word.
struct Int4Chunk {
  using Arithmetic = Fp32;
  using Scales = GroupScales;
  static constexpr int64_t kVectors = 8;
  static constexpr int64_t kValues = 8 * Vec::width;
  static constexpr bool kGrouped = true;
  static constexpr bool kInOrder = false;

  static constexpr int64_t bytes(int64_t values) { return values / 2; }
  static int64_t k_at(int64_t position) {
    const int64_t within = position % kValues;
    return position - within + within % Vec::width * 8 + within / Vec::width;
  }

  void take(const char* words) { words_ = load_words(words); }
  Vec operand(int64_t i) const { return int4_value(words_, static_cast<int>(i)); }

 private:
  Words words_;
};

#if defined(__AVX512BF16__)

// Each lane of a vector has one word. Operand i holds values 2 i and 2 i + 1 of every word.
struct Int4PairsChunk {
  using Arithmetic = Bf16;
  using Scales = GroupScales;
  static constexpr int64_t kVectors = 4;
  static constexpr int64_t kValues = 8 * Vec::width;
  static constexpr bool kGrouped = true;
  static constexpr bool kInOrder = false;

  static constexpr int64_t bytes(int64_t values) { return values / 2; }
  static int64_t k_at(int64_t position) {
    const int64_t within = position % kValues, lane = within / 2 % Vec::width;
    return position - within + 8 * lane + within / kStep<Bf16> * 2 + within % 2;
  }

  void take(const char* words) { words_ = load_words(words); }
  Pairs operand(int64_t i) const { return int4_pair(words_, static_cast<int>(i)); }

 private:
  Words words_;
};

#endif

// A stand-in for formats without a chunk of their own. unpack.h turns their values into floats,
// which gemv_unpacked.h multiplies. Activations are packed in the order in which words are
// unpacked.
struct UnpackedWords {
  using Arithmetic = Fp32;
  static constexpr bool kInOrder = false;

  static int64_t k_at(int64_t position) { return Int4Chunk::k_at(position); }
};

// The chunk type of a format, for activations of type T.
template <WeightFormat format, class T>
struct ChunkOf {
  using type = UnpackedWords;
};
template <class T>
struct ChunkOf<WeightFormat::plain, T> {
  using type = PlainChunk<typename ArithmeticOf<T>::type, T>;
};
template <class T>
struct ChunkOf<WeightFormat::int8, T> {
  using type = Int8Chunk<typename ArithmeticOf<T>::type>;
};
template <class T>
struct ChunkOf<WeightFormat::q8_0, T> {
  using type = Q8Chunk<typename ArithmeticOf<T>::type>;
};
template <class T>
struct ChunkOf<WeightFormat::int4, T> {
  using type = Int4Chunk;
};
#if defined(__AVX512BF16__)
template <>
struct ChunkOf<WeightFormat::int4, bf16> {
  using type = Int4PairsChunk;
};
#endif

}  // namespace mistral::cpu::MISTRAL_ISA

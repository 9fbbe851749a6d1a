// The one list of weight formats and their layouts. Other code that depends on a format is mostly
// in cpu/linear, in cuda/linear and, for Python, in mistral_ext/ops/weight.py.
#pragma once

#include "common.h"

namespace mistral {

// A weight has N rows of K values. In the list, q is a stored value, and w is the weight that it
// stands for. d, e, m, s and z are scales. If the list has no formula, w is q times the scale.
// "Each group" is each 32, 64 or 128 neighbouring values of a row. "Words" are explained below.
//   plain   [N, K] in the dtype of x
//   int8    [N, K] int8; a bf16 scale for each row
//   int4    words of signed values; a bf16 scale for each group
//   q8_0    [N, K] int8; an fp16 scale for each 32 values
//   q4_0    words of signed values; an fp16 scale for each group
//   q4_1    words, w = d q + m; fp16 d, m for each 32 values
//   q4_z    words, w = d (q - z); fp16 d, z for each group; z is an integer, 0 to 16
//   q4_k    words, w = d s q - e m; for each 256 values 16 bytes of scales: d and e (fp16), then
//           s and m of each 32 values in 6 bits (packed_scales in cpu/linear/unpack_words.h)
//   q5_k    q4_k with a fifth bit for each value; 256 values take 32 words and then 8 words of
//           fifth bits
//   q6_k    w = d s (q - 32); for each 256 values 32 words of low bits, then 16 words of high bits;
//           20 bytes of scales: s of each 16 values (int8), d (fp16), two bytes 0
//   iq4_nl  words, w = d kTable4[q]; an fp16 scale d for each 32 values
//   iq4_xs  words, w = d (s - 32) kTable4[q]; for each 256 values 8 bytes of scales: d (fp16), the
//           high 2 bits of each s (u16), the low 4 bits of each s (4 bytes); there is an s for each
//           32 values, and the first s has the lowest bits
//
// Words have 32 bits and hold 8 neighbouring values of 4 bits: [N, K / 8]. Value i of a word begins
// at bit int4_shift(i). So one shift and one mask, (word >> 4 j) & 0x000f000f, give value 2 j in
// the low 16 bits and value 2 j + 1 in the high 16 bits. Values are unsigned, 0 to 15, unless the
// list says "signed". Signed values are in two's complement.
//
// q5_k and q6_k keep the low 4 bits of 256 values in 32 such words. The fifth and sixth bits are in
// the further words, 8 (q5_k) or 16 (q6_k), that follow them. Each block b of 32 values, 0 to 7,
// has the words 4 b + i, where i is 0 to 3. If a value begins at bit t of word 4 b + i, then
//   q5_k: its fifth bit is bit fifth_bit_shift(i, t) of further word b
//   q6_k: its two high bits begin at bit high_bits_shift(i, t) of further word 8 (i / 2) + b
//
// From q8_0 on, each format but q4_z holds the same numbers as GGUF's blocks of its name. q4_0 and
// q4_z also hold the numbers of GPTQ and AWQ. Unlike in those files, values and scales here are in
// separate arrays, so that kernels can read rows in accesses of 16 bytes.
enum class WeightFormat {
  plain,
  int8,
  int4,
  q8_0,
  q4_0,
  q4_1,
  q4_z,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs
};

MISTRAL_HOST_DEVICE constexpr int int4_shift(int i) { return 4 * (i / 2) + 16 * (i % 2); }

// Where the fifth bit (q5_k) or the two high bits (q6_k) of a value begin in its further word. The
// value itself begins at bit `shift` of word `word`, 0 to 3, of its block of 32 values. A further
// word serves four words in q5_k and two words in q6_k. If a value is in byte j of its word, its
// further bits are in byte j of the further word.
MISTRAL_HOST_DEVICE constexpr int fifth_bit_shift(int word, int shift) {
  return shift / 8 * 8 + 2 * word + shift % 8 / 4;
}
MISTRAL_HOST_DEVICE constexpr int high_bits_shift(int word, int shift) {
  return shift / 8 * 8 + 4 * (word % 2) + shift % 8 / 2;
}

// The numbers that the 16 values q of iq4_nl and iq4_xs stand for. They are denser near 0, where
// most weights are.
constexpr int8_t kTable4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

// In q4_k, q5_k, q6_k and iq4_xs, this many neighbouring values (a super-block) share d.
constexpr int64_t kSuperBlock = 256;

// The largest K of an int8 weight. With more values in a row, the 32-bit sums of integer products
// in the lanes of a vector could overflow.
constexpr int64_t kMaxInt8Inputs = int64_t{1} << 20;

struct FormatInfo {
  const char* name;
  const char* value_dtype;  // torch's name for an element of the values; null: the dtype of x
  const char* scale_dtype;  // null: there are no scales
  int64_t bits;             // bits of a value; 0: as many as the dtype of x has
  int64_t element_bits;     // bits of an element of the array of values; 0: those of x's dtype
  int64_t scale_bytes;      // bytes of an element of the array of scales; 0: there are no scales
  int64_t group_scales;     // elements of the array of scales per group (int8: per row)
  // The sizes of the smallest and the largest group, both powers of two. Super-blocks count as
  // groups here. The sizes are 0 if the whole row shares a scale, or if there are no scales.
  int64_t least_group;
  int64_t most_group;
  int64_t most_inputs = 0;  // the largest K; 0: no limit
};

constexpr int kNumFormats = 12;
constexpr FormatInfo kFormats[kNumFormats] = {
    {"plain", nullptr, nullptr, 0, 0, 0, 0, 0, 0},
    {"int8", "int8", "bfloat16", 8, 8, 2, 1, 0, 0, kMaxInt8Inputs},
    {"int4", "int32", "bfloat16", 4, 32, 2, 1, 32, 128},
    {"q8_0", "int8", "float16", 8, 8, 2, 1, 32, 32},
    {"q4_0", "int32", "float16", 4, 32, 2, 1, 32, 128},
    {"q4_1", "int32", "float16", 4, 32, 2, 2, 32, 32},
    {"q4_z", "int32", "float16", 4, 32, 2, 2, 32, 128},
    {"q4_k", "int32", "uint8", 4, 32, 1, 16, kSuperBlock, kSuperBlock},
    {"q5_k", "int32", "uint8", 5, 32, 1, 16, kSuperBlock, kSuperBlock},
    {"q6_k", "int32", "uint8", 6, 32, 1, 20, kSuperBlock, kSuperBlock},
    {"iq4_nl", "int32", "float16", 4, 32, 2, 1, 32, 32},
    {"iq4_xs", "int32", "uint8", 4, 32, 1, 8, kSuperBlock, kSuperBlock},
};
[[gnu::always_inline]] inline constexpr const FormatInfo& info(WeightFormat format) {
  return kFormats[static_cast<int>(format)];
}

// Calls f with the format as a constant, and returns what f returns. For example:
// with_format(format, [&](auto f) { ... f.value ... }).
template <WeightFormat value_>
struct FormatConstant {
  static constexpr WeightFormat value = value_;
};
template <class F>
[[gnu::always_inline]] inline auto with_format(WeightFormat format, const F& f) {
  switch (format) {
    case WeightFormat::int8: return f(FormatConstant<WeightFormat::int8>{});
    case WeightFormat::int4: return f(FormatConstant<WeightFormat::int4>{});
    case WeightFormat::q8_0: return f(FormatConstant<WeightFormat::q8_0>{});
    case WeightFormat::q4_0: return f(FormatConstant<WeightFormat::q4_0>{});
    case WeightFormat::q4_1: return f(FormatConstant<WeightFormat::q4_1>{});
    case WeightFormat::q4_z: return f(FormatConstant<WeightFormat::q4_z>{});
    case WeightFormat::q4_k: return f(FormatConstant<WeightFormat::q4_k>{});
    case WeightFormat::q5_k: return f(FormatConstant<WeightFormat::q5_k>{});
    case WeightFormat::q6_k: return f(FormatConstant<WeightFormat::q6_k>{});
    case WeightFormat::iq4_nl: return f(FormatConstant<WeightFormat::iq4_nl>{});
    case WeightFormat::iq4_xs: return f(FormatConstant<WeightFormat::iq4_xs>{});
    case WeightFormat::plain: break;
  }
  return f(FormatConstant<WeightFormat::plain>{});
}

}  // namespace mistral

// The one list of weight formats, and how each is stored. Everything that differs between formats
// is here, in the traits of each device (cpu/linear/formats.h, cuda/linear/formats.cuh) and, for
// Python, in mistral_ext/ops/weight.py.
#pragma once

#include "common.h"

namespace mistral {

// A weight [N, K], row by row.
//   plain  in the dtype of x
//   int8   [N, K] int8; a bf16 scale for each row
//   int4   [N, K / 8] words of 32 bits, each of 8 neighbouring values; a bf16 scale for each 32, 64
//          or 128 neighbouring values. Value i of a word is in two's complement at bit
//          int4_shift(i): (word >> 4 j) & 0x000f000f is the pair (2 j, 2 j + 1).
//   q8_0   [N, K] int8; an fp16 scale for each 32 neighbouring values: GGUF's Q8_0, but with values
//   and
//          scales in separate arrays, so that a row is read in accesses of 16 bytes
enum class WeightFormat { plain, int8, int4, q8_0 };

MISTRAL_HOST_DEVICE constexpr int int4_shift(int i) { return 4 * (i / 2) + 16 * (i % 2); }

struct FormatInfo {
  const char* name;
  const char* value_dtype;  // torch's name for an element of the values; null: the dtype of x
  const char* scale_dtype;  // null: there are no scales
  int64_t bits;             // bits of a value; 0: as many as the dtype of x has
  int64_t element_values;   // values in an element
  // The fewest and the most neighbouring values that share a scale, powers of two. 0: the whole row
  // shares a scale.
  int64_t least_group;
  int64_t most_group;
};

constexpr int kNumFormats = 4;
constexpr FormatInfo kFormats[kNumFormats] = {
    {"plain", nullptr, nullptr, 0, 1, 0, 0},
    {"int8", "int8", "bfloat16", 8, 1, 0, 0},
    {"int4", "int32", "bfloat16", 4, 8, 32, 128},
    {"q8_0", "int8", "float16", 8, 1, 32, 32},
};
[[gnu::always_inline]] inline constexpr const FormatInfo& info(WeightFormat format) {
  return kFormats[static_cast<int>(format)];
}

// Calls f with the format as a constant: with_format(format, [&](auto f) { ... f.value ... }).
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
    case WeightFormat::plain: break;
  }
  return f(FormatConstant<WeightFormat::plain>{});
}

}  // namespace mistral

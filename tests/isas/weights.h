// Random weights in every format of csrc/formats.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "compare.h"

namespace mistral::comparison {

template <class Stored>
struct Weight {
  std::vector<Stored> plain;
  std::vector<char> values, scales;
  WeightPart part{};
};

// The number of inputs that a format takes, next to `inputs`.
inline int64_t inputs_of(WeightFormat format, int64_t group, int64_t inputs) {
  const int64_t unit = info(format).least_group ? group : 1;
  return ceil_div(inputs, unit) * unit;
}

inline void put_half(char* to, float x) {
  f16 half;
  from_float(x, &half);
  memcpy(to, &half, sizeof half);
}

// Writes the scales of one group.
template <class Data>
void put_scales(Data& data, WeightFormat format, char* to) {
  const float scale = (0.5f + 0.5f * std::fabs(data.gauss())) / 64;
  switch (format) {
    case WeightFormat::plain: break;
    case WeightFormat::int8:
    case WeightFormat::int4: {
      bf16 rounded;
      from_float(scale, &rounded);
      memcpy(to, &rounded, sizeof rounded);
      break;
    }
    case WeightFormat::q4_1:
      put_half(to + 2, data.gauss() / 16);
      put_half(to, scale);
      break;
    case WeightFormat::q4_z:
      put_half(to, scale);
      put_half(to + 2, static_cast<float>(data.integer(17)));
      break;
    case WeightFormat::q4_k:
    case WeightFormat::q5_k:
      for (int i = 0; i < 16; ++i) to[i] = static_cast<char>(data.integer(256));
      put_half(to, scale / 32);
      put_half(to + 2, scale / 16);
      break;
    case WeightFormat::q6_k:
      for (int i = 0; i < 16; ++i) to[i] = static_cast<char>(data.integer(256));
      put_half(to + 16, scale / 64);
      break;
    case WeightFormat::iq4_xs:
      for (int i = 0; i < 8; ++i) to[i] = static_cast<char>(data.integer(256));
      put_half(to, scale / 128);
      break;
    default: put_half(to, scale);
  }
}

// The scales have the same bits whatever the dtype; `plain` weights are rounded to it.
template <class Data>
Weight<typename Data::Type> random_weight(Data& data, WeightFormat format, int64_t rows,
                                          int64_t inputs, int64_t group) {
  Weight<typename Data::Type> weight;
  const FormatInfo& format_info = info(format);
  weight.part.rows = rows;
  weight.part.format = format;
  if (format == WeightFormat::plain) {
    weight.plain = data.normal(rows * inputs);
    weight.part.values = weight.plain.data();
    return weight;
  }
  weight.part.group = format_info.least_group ? group : inputs;
  weight.values.resize(static_cast<size_t>(rows * inputs * format_info.bits / 8));
  for (size_t i = 0; i < weight.values.size(); i += sizeof(uint64_t)) {
    const uint64_t bits = data.random();
    memcpy(weight.values.data() + i, &bits, std::min(sizeof bits, weight.values.size() - i));
  }
  const int64_t bytes = format_info.group_scales * format_info.scale_bytes;
  weight.scales.resize(static_cast<size_t>(rows * inputs / weight.part.group * bytes));
  for (size_t i = 0; i < weight.scales.size(); i += static_cast<size_t>(bytes)) {
    put_scales(data, format, weight.scales.data() + i);
  }
  weight.part.values = weight.values.data();
  weight.part.scales = weight.scales.data();
  return weight;
}

// Calls f(format, group) with every format and every size of its groups.
template <class F>
void for_each_format(const F& f) {
  for (int i = 0; i < kNumFormats; ++i) {
    const auto format = static_cast<WeightFormat>(i);
    const FormatInfo& format_info = info(format);
    int64_t group = format_info.least_group;
    do {
      f(format, group);
      group *= 2;
    } while (group != 0 && group <= format_info.most_group);
  }
}

}  // namespace mistral::comparison

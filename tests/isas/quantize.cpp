// Rounding to kTable4. Sets may choose scales that are equally good, so the squared errors that
// they leave are compared.
#include <algorithm>

#include "compare.h"

namespace mistral::comparison {
namespace {

constexpr int64_t kRows = 5;

// The weights that values and scales stand for.
Floats dequantized(bool two_levels, const std::vector<uint32_t>& values,
                   const std::vector<char>& scales) {
  Floats out;
  for (size_t i = 0; i < values.size() * 8; ++i) {
    f16 half;
    float scale;
    if (two_levels) {
      const char* group = scales.data() + i / kSuperBlock * 8;
      const int block = static_cast<int>(i % kSuperBlock / 32);
      uint16_t high;
      memcpy(&half, group, sizeof half);
      memcpy(&high, group + 2, sizeof high);
      const int low = static_cast<uint8_t>(group[4 + block / 2]) >> 4 * (block % 2) & 15;
      scale = to_float(half) * static_cast<float>((low | (high >> 2 * block & 3) << 4) - 32);
    } else {
      memcpy(&half, scales.data() + i / 32 * 2, sizeof half);
      scale = to_float(half);
    }
    const uint32_t index = values[i / 8] >> int4_shift(static_cast<int>(i % 8)) & 15;
    out.push_back(scale * kTable4[index]);
  }
  return out;
}

// The error that the kernel minimises: an input counts by its importance, and large weights count
// more.
double weighted_error(const Floats& x, const Floats& rounded, const Floats& importance) {
  const size_t inputs = importance.size();
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t begin = i - i % inputs % kSuperBlock;
    const size_t end = std::min(begin + kSuperBlock, i - i % inputs + inputs);
    double mean = 0;
    for (size_t j = begin; j < end; ++j) mean += std::fabs(x[j]) / double(end - begin);
    const double off = double(x[i]) - rounded[i];
    error += off * off * (std::fabs(x[i]) + mean) * importance[i % inputs];
  }
  return error;
}

template <class T>
void compare_quantize_of(const Set& set, const std::string& dtype, bool two_levels) {
  const int64_t inputs = two_levels ? 512 : 352;
  double errors[2];
  Floats largest_of[2];
  for (const Set* which : {&set, &kScalar}) {
    use(*which);
    Data<T, T> data(static_cast<uint64_t>(inputs));
    const auto weight = data.normal(kRows * inputs);
    Floats importance = data.floats(inputs);
    for (float& x : importance) x = std::fabs(x);
    std::vector<uint32_t> values(static_cast<size_t>(kRows * inputs / 8));
    std::vector<char> scales(static_cast<size_t>(kRows * (two_levels ? inputs / 32 : inputs / 16)));
    Floats largest(kRows);
    QuantizeParams p{};
    p.dtype = dtype_of<T>();
    p.two_levels = two_levels;
    p.weight = weight.data();
    p.importance = importance.data();
    p.values = values.data();
    p.scales = scales.data();
    p.largest = largest.data();
    p.rows = kRows;
    p.inputs = p.stride_weight_row = inputs;
    cpu::quantize(p, kThreads);
    const bool reference = which == &kScalar;
    errors[reference] =
        weighted_error(widened(weight), dequantized(two_levels, values, scales), importance);
    largest_of[reference] = largest;
  }
  const std::string label = "quantize, " + dtype + (two_levels ? ", two levels" : "");
  report(label, std::fabs(errors[0] / errors[1] - 1) < 1e-3,
         "errors " + std::to_string(errors[0]) + " and " + std::to_string(errors[1]));
  report(label + ", largest", largest_of[0] == largest_of[1], "they differ");
}

void compare_feedback(const Set& set, bool two_levels) {
  constexpr int64_t kColumns = 256;
  Floats rounded[2], errors[2];
  for (const Set* which : {&set, &kScalar}) {
    use(*which);
    Data<float, float> data(3);
    auto weight = data.normal(kRows * kColumns);
    Floats factor = data.floats(kColumns * kColumns, 0.03f), importance(kColumns, 1.0f);
    for (int64_t i = 0; i < kColumns; ++i) {
      for (int64_t j = 0; j < i; ++j) factor[i * kColumns + j] = 0;
      factor[i * kColumns + i] = 1;
    }
    std::vector<uint32_t> values(kRows * kColumns / 8);
    std::vector<char> scales(static_cast<size_t>(kRows * kColumns / 32 * (two_levels ? 1 : 2)));
    QuantizeFeedbackParams p{};
    p.two_levels = two_levels;
    p.weight = weight.data();
    p.factor = factor.data();
    p.importance = importance.data();
    p.values = values.data();
    p.scales = scales.data();
    p.rows = kRows;
    p.columns = p.stride_weight_row = p.stride_factor_row = kColumns;
    p.stride_values_row = kColumns / 8;
    p.stride_scales_row = kColumns / 32 * (two_levels ? 1 : 2);
    cpu::quantize_feedback(p, kThreads);
    rounded[which == &kScalar] = dequantized(two_levels, values, scales);
    errors[which == &kScalar] = weight;
  }
  // From where a set chooses another scale on, all that follows differs.
  double left[2] = {};
  for (int i = 0; i < 2; ++i) {
    for (float error : errors[i]) left[i] += double(error) * error;
  }
  report(std::string("quantize_feedback") + (two_levels ? ", two levels" : ""),
         std::fabs(left[0] / left[1] - 1) < 0.02 &&
             largest_error(rounded[0], rounded[1]) < 0.2f * largest(rounded[1]),
         "errors " + std::to_string(left[0]) + " and " + std::to_string(left[1]));
}

}  // namespace

void compare_quantize(const Set& set) {
  for (bool two_levels : {false, true}) {
    for_each_dtype([&](auto type, const std::string& dtype) {
      compare_quantize_of<decltype(type)>(set, dtype, two_levels);
    });
    compare_feedback(set, two_levels);
  }
}

}  // namespace mistral::comparison

#include "linear_checks.h"

#include <cstdlib>

namespace mistral::python {
namespace {

// Checks that a row of `inputs` values consists of whole groups, that the format allows their size,
// and that `scales`, the number of scales of a row, is right for them.
void expect_groups(const char* op, const char* name, int64_t inputs, int64_t scales,
                   const WeightPart& part) {
  const FormatInfo& format = info(part.format);
  std::string sizes;
  bool fits = false;
  for (int64_t size = format.least_group; size <= format.most_group; size *= 2) {
    const bool last = size == format.most_group;
    sizes += (sizes.empty() ? "" : last ? " or " : ", ") + std::to_string(size);
    fits = fits || (part.group == size && inputs % size == 0 &&
                    inputs / size * format.group_scales == scales);
  }
  if (fits) return;
  const std::string each =
      format.group_scales == 1 ? "a scale" : std::to_string(format.group_scales) + " scales";
  fail(op, std::string(name) + " has " + std::to_string(inputs) + " inputs and " +
               std::to_string(scales) + " scales a row, expected groups of " + sizes +
               " inputs with " + each + " each");
}

WeightFormat format_of(const char* op, const char* name, const py::handle& given) {
  const auto wanted = given.cast<std::string>();
  std::string names;
  for (int i = 0; i < kNumFormats; ++i) {
    if (wanted == kFormats[i].name) return static_cast<WeightFormat>(i);
    names += (i == 0 ? "" : ", ") + std::string(kFormats[i].name);
  }
  fail(op, "format of " + std::string(name) + " is '" + wanted + "', expected one of " + names);
}

}  // namespace

bool& exact_products() {
  static bool exact = [] {
    const char* wanted = std::getenv("MISTRAL_EXT_EXACT");
    return wanted && *wanted && std::string(wanted) != "0";
  }();
  return exact;
}

Names names_of(Epilogue epilogue, size_t parts) {
  if (epilogue == Epilogue::swiglu) {
    return {{"gate", "up", nullptr}, {"scales of gate", "scales of up", nullptr}};
  }
  if (epilogue == Epilogue::rope) {
    return {{"wq", "wk", "wv"}, {"scales of wq", "scales of wk", "scales of wv"}};
  }
  if (parts == 1) return {{"weight", nullptr, nullptr}, {"scales of weight", nullptr, nullptr}};
  return {{"weight[0]", "weight[1]", "weight[2]"},
          {"scales of weight[0]", "scales of weight[1]", "scales of weight[2]"}};
}

WeightPart part_of(const char* op, const Names& names, size_t i, const Weights& weights,
                   const Tensor& x) {
  const int64_t inputs = x.size(1);
  WeightPart part{};
  part.format = format_of(op, names.values[i], weights.formats[i]);
  const FormatInfo& format = info(part.format);
  if (!format.value_dtype) {
    const Tensor values(op, names.values[i], weights.values[i]);
    values.expect_shape({-1, inputs});
    values.expect_like(x);
    values.expect_contiguous();
    part.values = values.data();
    part.rows = values.size(0);
    return part;
  }
  const Table values(op, names.values[i], weights.values[i], format.value_dtype);
  values.expect_shape({-1, inputs * format.bits / format.element_bits});
  values.expect_device_of(x);
  values.expect_contiguous();
  const Table scales(op, names.scales[i], weights.scales[i], format.scale_dtype);
  scales.expect_shape({values.size(0), format.least_group ? -1 : 1});
  scales.expect_device_of(x);
  scales.expect_contiguous();
  const int64_t count = scales.size(1), groups = count / format.group_scales;
  part.group = groups > 0 ? max(1, inputs / groups) : 0;
  if (format.least_group) expect_groups(op, names.values[i], inputs, count, part);
  if (format.most_inputs && inputs > format.most_inputs) {
    fail(op, std::string(names.values[i]) + " has " + std::to_string(inputs) +
                 " inputs, expected at most " + std::to_string(format.most_inputs) + " as " +
                 format.name);
  }
  part.values = values.data();
  part.scales = scales.data();
  part.rows = values.size(0);
  return part;
}

WeightPart single_part(const char* op, const py::object& values, const py::object& scales,
                       const py::str& format, const Tensor& x) {
  Weights weights;
  weights.values.append(values);
  weights.scales.append(scales);
  weights.formats.append(format);
  return part_of(op, names_of(Epilogue::store, 1), 0, weights, x);
}

void expect_aligned(const char* op, const char* name, const void* begin, uintptr_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  if (address % bytes == 0) return;
  fail(op, std::string(name) + " begins at address " + std::to_string(address) +
               ", expected a multiple of " + std::to_string(bytes) + " on a CUDA device");
}

void expect_readable_by_eights(const char* op, const WeightPart& weight, int64_t inputs) {
  if (inputs % 8 != 0) {
    fail(op, "weight has " + std::to_string(inputs) +
                 " inputs, expected a multiple of 8 on a CUDA device");
  }
  expect_aligned(op, "weight", weight.values, 8);
  expect_aligned(op, "scales of weight", weight.scales, 4);
}

LinearParams checked_linear(const char* op, const Tensor& x, const Weights& weights,
                            const py::object& norm_, double eps, const py::object& out_,
                            Epilogue epilogue) {
  x.expect_shape({-1, -1});
  x.expect_last_axis_contiguous();
  LinearParams p{};
  p.dtype = x.dtype();
  p.epilogue = epilogue;
  p.x = x.data();
  p.tokens = x.size(0);
  p.inputs = x.size(1);
  p.stride_x_token = x.stride(0);
  p.eps = static_cast<float>(eps);
  p.exact = exact_products();
  const size_t count = weights.values.size();
  if (count < 1 || count > static_cast<size_t>(kMaxParts)) {
    fail(op, "number of weights is " + std::to_string(count) + ", expected 1 to " +
                 std::to_string(kMaxParts));
  }
  if (epilogue == Epilogue::rope && count != 3) {
    fail(op,
         "number of weights is " + std::to_string(count) + ", expected 3: query, key and value");
  }
  if (weights.scales.size() != count || weights.formats.size() != count) {
    fail(op, "number of scales is " + std::to_string(weights.scales.size()) + " and of formats " +
                 std::to_string(weights.formats.size()) + ", expected " + std::to_string(count) +
                 " like weights");
  }
  const Names names = names_of(epilogue, count);
  for (size_t i = 0; i < count; ++i) p.parts[i] = part_of(op, names, i, weights, x);
  p.num_parts = static_cast<int64_t>(count);
  int64_t outputs = outputs_of_all(p);
  if (epilogue == Epilogue::swiglu) {
    if (p.parts[0].rows != p.parts[1].rows) {
      fail(op, "up has " + std::to_string(p.parts[1].rows) + " outputs, expected " +
                   std::to_string(p.parts[0].rows) + " like gate");
    }
    outputs = p.parts[0].rows;
  }
  if (!norm_.is_none()) {
    const Tensor norm(op, "norm", norm_);
    norm.expect_shape({x.size(1)});
    norm.expect_like(x);
    norm.expect_contiguous();
    p.norm = norm.data();
    if (!(eps >= 0)) fail(op, "eps is " + std::to_string(eps) + ", expected 0 or more");
  }
  if (!out_.is_none()) {
    const Tensor out(op, epilogue == Epilogue::add ? "residual" : "out", out_);
    out.expect_shape({x.size(0), outputs});
    out.expect_like(x);
    out.expect_last_axis_contiguous();
    out.expect_no_shared_elements();
    p.out = out.data();
    p.stride_out_token = out.stride(0);
  }
  return p;
}

int64_t outputs_of_all(const LinearParams& p) {
  int64_t outputs = 0;
  for (int64_t i = 0; i < p.num_parts; ++i) outputs += p.parts[i].rows;
  return outputs;
}

}  // namespace mistral::python

#include "../csrc/quantize.h"

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

// The array of scales that is to be filled for a weight [N, K]. Its dtype selects the format: fp16
// for iq4_nl, or uint8 for iq4_xs (two_levels).
struct Scales {
  Table table;
  bool two_levels;
};

Scales scales_of(const Tensor& weight, const py::object& object) {
  const auto dtype = py::cast<std::string>(py::str(py::getattr(object, "dtype", py::none())));
  const bool two_levels = dtype == "torch.uint8";
  const Table table(weight.op(), "scales", object, two_levels ? "uint8" : "float16");
  const int64_t inputs = weight.size(1), group = two_levels ? kSuperBlock : 32;
  if (inputs == 0 || inputs % group != 0) {
    fail(weight.op(), std::string(weight.name()) + " has " + std::to_string(inputs) +
                          " columns, expected a positive multiple of " + std::to_string(group));
  }
  // Either an fp16 number for each 32 inputs, or 8 bytes for each 256 inputs. Both make K / 32
  // elements.
  table.expect_shape({weight.size(0), inputs / 32});
  table.expect_last_axis_contiguous();
  table.expect_device_of(weight);
  return {table, two_levels};
}

const float* importance_of(const Tensor& weight, const py::object& importance_) {
  if (importance_.is_none()) return nullptr;
  const Table importance(weight.op(), "importance", importance_, "float32");
  importance.expect_shape({weight.size(1)});
  importance.expect_contiguous();
  importance.expect_device_of(weight);
  return static_cast<const float*>(importance.data());
}

void quantize(py::object weight_, py::object importance, py::object values_, py::object scales_,
              py::object largest_, ExecutionTarget target) {
  constexpr const char* op = "quantize";
  const Tensor weight(op, "weight", weight_);
  expect_cpu(weight);
  weight.expect_shape({-1, -1});
  weight.expect_last_axis_contiguous();
  const Scales scales = scales_of(weight, scales_);
  const Table values(op, "values", values_, "int32"), largest(op, "largest", largest_, "float32");
  values.expect_shape({weight.size(0), weight.size(1) / 8});
  largest.expect_shape({weight.size(0)});
  for (const Table* table : {&values, &largest, &scales.table}) {
    table->expect_contiguous();
    table->expect_device_of(weight);
  }
  QuantizeParams p{};
  p.dtype = weight.dtype();
  p.two_levels = scales.two_levels;
  p.weight = weight.data();
  p.importance = importance_of(weight, importance);
  p.values = static_cast<uint32_t*>(values.data());
  p.scales = scales.table.data();
  p.largest = static_cast<float*>(largest.data());
  p.rows = weight.size(0);
  p.inputs = weight.size(1);
  p.stride_weight_row = weight.stride(0);
  run_on_cpu(target, p, &cpu::quantize);
}

void quantize_feedback(py::object weight_, py::object factor_, py::object importance,
                       py::object values_, py::object scales_, ExecutionTarget target) {
  constexpr const char* op = "quantize_feedback";
  const Table weight(op, "weight", weight_, "float32"), factor(op, "factor", factor_, "float32"),
      values(op, "values", values_, "int32");
  expect_cpu(weight);
  weight.expect_shape({-1, -1});
  const int64_t columns = weight.size(1);
  if (columns > kSuperBlock) {
    fail(op, "weight has " + std::to_string(columns) + " columns, expected at most " +
                 std::to_string(kSuperBlock));
  }
  const Scales scales = scales_of(weight, scales_);
  factor.expect_shape({columns, columns});
  values.expect_shape({weight.size(0), columns / 8});
  for (const Table* table : {&weight, &factor, &values}) {
    table->expect_last_axis_contiguous();
    table->expect_device_of(weight);
  }
  QuantizeFeedbackParams p{};
  p.two_levels = scales.two_levels;
  p.weight = static_cast<float*>(weight.data());
  p.factor = static_cast<const float*>(factor.data());
  p.importance = importance_of(weight, importance);
  p.values = static_cast<uint32_t*>(values.data());
  p.scales = static_cast<char*>(scales.table.data());
  p.rows = weight.size(0);
  p.columns = columns;
  p.stride_weight_row = weight.stride(0);
  p.stride_factor_row = factor.stride(0);
  p.stride_values_row = values.stride(0);
  p.stride_scales_row = scales.table.stride(0) * (p.two_levels ? 1 : 2);
  run_on_cpu(target, p, &cpu::quantize_feedback);
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize", &quantize, py::arg("weight"), py::arg("importance").none(true),
        py::arg("values"), py::arg("scales"), py::arg("largest"), py::arg("target"));
}

void bind_quantize_feedback(py::module_& m) {
  m.def("quantize_feedback", &quantize_feedback, py::arg("weight"), py::arg("factor"),
        py::arg("importance").none(true), py::arg("values"), py::arg("scales"), py::arg("target"));
}

}  // namespace mistral::python

#include "../csrc/lora.h"

#include <pybind11/stl.h>

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

// Checks that the int32 values of a table are `least` to `most`. Values in GPU memory are not read
// back, because every call would then wait for the GPU.
void check_values(const char* op, const char* name, const Table& table, int64_t least,
                  int64_t most) {
  if (table.is_cuda()) return;
  const auto* values = static_cast<const int32_t*>(table.data());
  const int64_t count = table.size(0) * (table.dims() > 1 ? table.size(1) : 1);
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= least && values[i] <= most) continue;
    fail(op, std::string(name) + " has " + std::to_string(values[i]) + ", expected " +
                 std::to_string(least) + " to " + std::to_string(most));
  }
}

void lora(py::object x_, py::object a_, py::object b_, py::object scales_, py::object ranks_,
          py::object adapters_, const std::vector<int64_t>& parts, py::object hidden_,
          py::object out_, ExecutionTarget target) {
  constexpr const char* op = "lora";
  const Tensor x(op, "x", x_), a(op, "a", a_), b(op, "b", b_), out(op, "out", out_);
  const Table scales(op, "scales", scales_, "float32"), ranks(op, "ranks", ranks_, "int32");
  const Table adapters(op, "adapters", adapters_, "int32"),
      hidden(op, "hidden", hidden_, "float32");
  const auto num_parts = static_cast<int64_t>(parts.size());
  if (num_parts < 1 || num_parts > kMaxLoraParts) {
    fail(op, "parts has " + std::to_string(num_parts) + " sizes, expected 1 to " +
                 std::to_string(kMaxLoraParts));
  }
  x.expect_shape({-1, -1});
  x.expect_last_axis_contiguous();
  a.expect_shape({-1, num_parts, -1, x.size(1)});
  int64_t outputs = 0;
  for (const int64_t part : parts) {
    if (part < 0) fail(op, "parts has " + std::to_string(part) + ", expected 0 or more");
    outputs += part;
  }
  b.expect_shape({a.size(0), a.size(2), outputs});
  for (const Tensor* tensor : {&a, &b}) {
    tensor->expect_like(x);
    tensor->expect_contiguous();
  }
  for (const Table* table : {&scales, &ranks}) {
    table->expect_shape({a.size(0), num_parts});
    table->expect_contiguous();
    table->expect_device_of(x);
  }
  adapters.expect_shape({x.size(0)});
  adapters.expect_contiguous();
  adapters.expect_device_of(x);
  hidden.expect_shape({x.size(0), num_parts, a.size(2)});
  hidden.expect_contiguous();
  hidden.expect_device_of(x);
  out.expect_shape({x.size(0), outputs});
  out.expect_last_axis_contiguous();
  out.expect_no_shared_elements();
  if (out.dtype() == DType::f32) {
    out.expect_device_of(x);
  } else {
    out.expect_like(x);
  }
  check_values(op, "ranks", ranks, 0, a.size(2));
  check_values(op, "adapters", adapters, INT32_MIN, a.size(0) - 1);

  LoraParams p{};
  p.dtype = x.dtype();
  p.out_dtype = out.dtype();
  p.x = x.data();
  p.a = a.data();
  p.b = b.data();
  p.scales = static_cast<const float*>(scales.data());
  p.ranks = static_cast<const int32_t*>(ranks.data());
  p.adapters = static_cast<const int32_t*>(adapters.data());
  p.hidden = static_cast<float*>(hidden.data());
  p.out = out.data();
  for (int64_t i = 0; i < num_parts; ++i) p.part_outputs[i] = parts[static_cast<size_t>(i)];
  p.num_parts = num_parts;
  p.tokens = x.size(0);
  p.inputs = x.size(1);
  p.outputs = outputs;
  p.max_rank = a.size(2);
  p.stride_x_token = x.stride(0);
  p.stride_out_token = out.stride(0);
  run(x, target, p, MISTRAL_KERNELS(lora));
}

void lora_gradient(py::object hidden_, py::object x_, py::object adapters_, py::object out_,
                   ExecutionTarget target) {
  constexpr const char* op = "lora_gradient";
  const Table hidden(op, "hidden", hidden_, "float32"),
      adapters(op, "adapters", adapters_, "int32"), out(op, "out", out_, "float32");
  const Tensor x(op, "x", x_);
  x.expect_shape({-1, -1});
  x.expect_last_axis_contiguous();
  hidden.expect_shape({x.size(0), -1});
  hidden.expect_last_axis_contiguous();
  adapters.expect_shape({x.size(0)});
  adapters.expect_contiguous();
  out.expect_shape({-1, hidden.size(1), x.size(1)});
  out.expect_contiguous();
  for (const Table* table : {&hidden, &adapters, &out}) table->expect_device_of(x);
  LoraGradientParams p{};
  p.dtype = x.dtype();
  p.hidden = static_cast<const float*>(hidden.data());
  p.x = x.data();
  p.adapters = static_cast<const int32_t*>(adapters.data());
  p.out = static_cast<float*>(out.data());
  p.tokens = x.size(0);
  p.rank = hidden.size(1);
  p.columns = x.size(1);
  p.num_adapters = out.size(0);
  p.stride_hidden_token = hidden.stride(0);
  p.stride_x_token = x.stride(0);
  run(x, target, p, MISTRAL_KERNELS(lora_gradient));
}

}  // namespace

void bind_lora(py::module_& m) {
  m.def("lora", &lora, py::arg("x"), py::arg("a"), py::arg("b"), py::arg("scales"),
        py::arg("ranks"), py::arg("adapters"), py::arg("parts"), py::arg("hidden"), py::arg("out"),
        py::arg("target"));
}

void bind_lora_gradient(py::module_& m) {
  m.def("lora_gradient", &lora_gradient, py::arg("hidden"), py::arg("x"), py::arg("adapters"),
        py::arg("out"), py::arg("target"));
}

}  // namespace mistral::python

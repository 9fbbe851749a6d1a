#include "../csrc/linear.h"

#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

constexpr const char* op = "linear";

void check(const Tensor& x, const Tensor& weight) {
  x.expect_shape({-1, -1});
  x.expect_last_axis_contiguous();
  weight.expect_shape({-1, x.size(1)});
  weight.expect_like(x);
  weight.expect_contiguous();
}

// For the caller who then multiplies by other means.
void check_linear(py::object x, py::object weight) {
  check(Tensor(op, "x", x), Tensor(op, "weight", weight));
}

void linear(py::object x_, py::object weight_, py::object out_, int threads) {
  const Tensor x(op, "x", x_), weight(op, "weight", weight_), out(op, "out", out_);
  check(x, weight);

  LinearParams p{};
  p.dtype = x.dtype();
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.tokens = x.size(0);
  p.inputs = x.size(1);
  p.outputs = weight.size(0);
  p.stride_x_token = x.stride(0);
  p.stride_out_token = out.stride(0);
  const py::gil_scoped_release release;
  cpu::linear(p, threads);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("check_linear", &check_linear, py::arg("x"), py::arg("weight"));
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("threads"));
}

}  // namespace mistral::python

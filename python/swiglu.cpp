#include "../csrc/swiglu.h"

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

void swiglu(py::object gate_, py::object up_, py::object out_, ExecutionTarget target) {
  constexpr const char* op = "swiglu";
  const Tensor gate(op, "gate", gate_), up(op, "up", up_), out(op, "out", out_);
  gate.expect_shape({-1, -1});
  gate.expect_last_axis_contiguous();
  up.expect_shape({gate.size(0), gate.size(1)});
  up.expect_like(gate);
  up.expect_last_axis_contiguous();

  SwigluParams p{};
  p.dtype = gate.dtype();
  p.gate = gate.data();
  p.up = up.data();
  p.out = out.data();
  p.tokens = gate.size(0);
  p.dim = gate.size(1);
  p.stride_gate_token = gate.stride(0);
  p.stride_up_token = up.stride(0);
  p.stride_out_token = out.stride(0);
  run(gate, target, p, MISTRAL_KERNELS(swiglu));
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("target"));
}

}  // namespace mistral::python

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

void swiglu_backward(py::object gate_, py::object up_, py::object d_out_, py::object d_gate_,
                     py::object d_up_, ExecutionTarget target) {
  constexpr const char* op = "swiglu_backward";
  const Tensor gate(op, "gate", gate_), up(op, "up", up_), d_out(op, "d_out", d_out_),
      d_gate(op, "d_gate", d_gate_), d_up(op, "d_up", d_up_);
  gate.expect_shape({-1, -1});
  for (const Tensor* tensor : {&gate, &up, &d_out, &d_gate, &d_up}) {
    tensor->expect_shape({gate.size(0), gate.size(1)});
    tensor->expect_like(gate);
    tensor->expect_last_axis_contiguous();
  }
  SwigluBackwardParams p{};
  p.dtype = gate.dtype();
  p.gate = gate.data();
  p.up = up.data();
  p.d_out = d_out.data();
  p.d_gate = d_gate.data();
  p.d_up = d_up.data();
  p.tokens = gate.size(0);
  p.dim = gate.size(1);
  p.stride_gate_token = gate.stride(0);
  p.stride_up_token = up.stride(0);
  p.stride_d_out_token = d_out.stride(0);
  p.stride_d_gate_token = d_gate.stride(0);
  p.stride_d_up_token = d_up.stride(0);
  run(gate, target, p, MISTRAL_KERNELS(swiglu_backward));
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("target"));
}

void bind_swiglu_backward(py::module_& m) {
  m.def("swiglu_backward", &swiglu_backward, py::arg("gate"), py::arg("up"), py::arg("d_out"),
        py::arg("d_gate"), py::arg("d_up"), py::arg("target"));
}

}  // namespace mistral::python

#include "../csrc/rms_norm.h"

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

void rms_norm(py::object x_, py::object weight_, py::object residual_, py::object out_, float eps,
              ExecutionTarget target) {
  constexpr const char* op = "rms_norm";
  const Tensor x(op, "x", x_), weight(op, "weight", weight_), out(op, "out", out_);
  x.expect_shape({-1, -1});
  x.expect_last_axis_contiguous();
  weight.expect_shape({x.size(1)});
  weight.expect_like(x);
  weight.expect_contiguous();
  if (!(eps >= 0)) fail(op, "eps is " + std::to_string(eps) + ", expected 0 or more");

  RmsNormParams p{};
  p.dtype = x.dtype();
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.stride_x_token = x.stride(0);
  p.stride_out_token = out.stride(0);
  p.eps = eps;
  if (!residual_.is_none()) {
    const Tensor residual(op, "residual", residual_);
    residual.expect_shape({x.size(0), x.size(1)});
    residual.expect_like(x);
    residual.expect_last_axis_contiguous();
    residual.expect_no_shared_elements();
    p.residual = residual.data();
    p.stride_residual_token = residual.stride(0);
  }
  run(x, target, p, MISTRAL_KERNELS(rms_norm));
}

void rms_norm_backward(py::object x_, py::object weight_, py::object d_out_, py::object d_x_,
                       float eps, ExecutionTarget target) {
  constexpr const char* op = "rms_norm_backward";
  const Tensor x(op, "x", x_), weight(op, "weight", weight_), d_out(op, "d_out", d_out_),
      d_x(op, "d_x", d_x_);
  x.expect_shape({-1, -1});
  weight.expect_shape({x.size(1)});
  weight.expect_like(x);
  weight.expect_contiguous();
  for (const Tensor* tensor : {&x, &d_out, &d_x}) {
    tensor->expect_shape({x.size(0), x.size(1)});
    tensor->expect_like(x);
    tensor->expect_last_axis_contiguous();
  }
  RmsNormBackwardParams p{};
  p.dtype = x.dtype();
  p.x = x.data();
  p.weight = weight.data();
  p.d_out = d_out.data();
  p.d_x = d_x.data();
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.stride_x_token = x.stride(0);
  p.stride_d_out_token = d_out.stride(0);
  p.stride_d_x_token = d_x.stride(0);
  p.eps = eps;
  run(x, target, p, MISTRAL_KERNELS(rms_norm_backward));
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("residual").none(true),
        py::arg("out"), py::arg("eps"), py::arg("target"));
}

void bind_rms_norm_backward(py::module_& m) {
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("d_out"),
        py::arg("d_x"), py::arg("eps"), py::arg("target"));
}

}  // namespace mistral::python

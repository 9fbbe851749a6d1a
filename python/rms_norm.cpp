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
    p.residual = residual.data();
    p.stride_residual_token = residual.stride(0);
  }
  run(x, target, p, MISTRAL_KERNELS(rms_norm));
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("residual").none(true),
        py::arg("out"), py::arg("eps"), py::arg("target"));
}

}  // namespace mistral::python

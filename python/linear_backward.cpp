#include "../csrc/linear.h"

#include "call.h"
#include "device.h"
#include "linear_checks.h"
#include "ops.h"

namespace mistral::python {
namespace {

Call linear_backward(py::object d_out_, py::list values, py::list scales, py::list formats,
                     py::object d_x_) {
  constexpr const char* op = "linear_backward";
  const Tensor d_x(op, "d_x", d_x_);
  expect_cpu(d_x);
  const LinearParams forward = checked_linear(op, d_x, {values, scales, formats}, py::none(), 0,
                                              py::none(), Epilogue::store);
  const Tensor d_out(op, "d_out", d_out_);
  d_out.expect_shape({d_x.size(0), outputs_of_all(forward)});
  d_out.expect_like(d_x);
  d_out.expect_last_axis_contiguous();
  LinearBackwardParams p{};
  p.dtype = forward.dtype;
  p.d_out = d_out.data();
  p.d_x = d_x.data();
  for (int64_t i = 0; i < forward.num_parts; ++i) p.parts[i] = forward.parts[i];
  p.num_parts = forward.num_parts;
  p.tokens = forward.tokens;
  p.inputs = forward.inputs;
  p.stride_d_out_token = d_out.stride(0);
  p.stride_d_x_token = forward.stride_x_token;
  return {cpu::linear_backward_scratch_bytes(p), 0,
          [p](void* workspace, int32_t*, ExecutionTarget target) mutable {
            p.scratch = workspace;
            run_on_cpu(target, p, &cpu::linear_backward);
          }};
}

}  // namespace

void bind_linear_backward(py::module_& m) {
  m.def("linear_backward", &linear_backward, py::arg("d_out"), py::arg("values"), py::arg("scales"),
        py::arg("formats"), py::arg("d_x"));
}

}  // namespace mistral::python

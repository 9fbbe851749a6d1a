#include "../csrc/rotate.h"

#include "device.h"
#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

void rotate(py::object x_, py::object sequences_, py::object frequencies, bool backward,
            py::object out_, ExecutionTarget target) {
  constexpr const char* op = "rotate";
  const Tensor x(op, "x", x_), out(op, "out", out_);
  const Table sequences(op, "sequences", sequences_);
  x.expect_shape({-1, -1, -1});
  x.expect_last_axis_contiguous();
  check_head_dim(x);
  out.expect_shape({x.size(0), x.size(1), x.size(2)});
  out.expect_like(x);
  out.expect_last_axis_contiguous();
  check_packed(x, sequences, true);
  RotateParams p{};
  p.dtype = x.dtype();
  p.x = x.data();
  p.out = out.data();
  p.sequences = static_cast<const Sequence*>(sequences.data());
  p.frequencies = checked_frequencies(x, frequencies);
  p.num_sequences = sequences.size(0);
  p.tokens = x.size(0);
  p.heads = x.size(1);
  p.head_dim = x.size(2);
  p.stride_x_token = x.stride(0);
  p.stride_x_head = x.stride(1);
  p.stride_out_token = out.stride(0);
  p.stride_out_head = out.stride(1);
  p.backward = backward;
  run(x, target, p, MISTRAL_KERNELS(rotate));
}

}  // namespace

void bind_rotate(py::module_& m) {
  m.def("rotate", &rotate, py::arg("x"), py::arg("sequences"), py::arg("frequencies"),
        py::arg("backward"), py::arg("out"), py::arg("target"));
}

}  // namespace mistral::python

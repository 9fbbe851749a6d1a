#include "../csrc/cross_entropy.h"

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

// factors is None if the caller wants no gradient.
void cross_entropy(py::object logits_, py::object targets_, py::object factors_, py::object loss_,
                   ExecutionTarget target) {
  constexpr const char* op = "cross_entropy";
  const Tensor logits(op, "logits", logits_);
  const Table targets(op, "targets", targets_), loss(op, "loss", loss_, "float32");
  logits.expect_shape({-1, -1});
  logits.expect_last_axis_contiguous();
  CrossEntropyParams p{};
  const auto expect_row_values = [&](const Table& table) {
    table.expect_shape({logits.size(0)});
    table.expect_contiguous();
    table.expect_device_of(logits);
  };
  expect_row_values(targets);
  expect_row_values(loss);
  if (!factors_.is_none()) {
    const Table factors(op, "factors", factors_, "float32");
    expect_row_values(factors);
    p.factors = static_cast<const float*>(factors.data());
  }
  p.targets = static_cast<const int64_t*>(targets.data());
  // Targets in GPU memory are not read back, because every call would then wait for the GPU.
  for (int64_t i = 0; !logits.is_cuda() && i < targets.size(0); ++i) {
    if (p.targets[i] >= 0 && p.targets[i] < logits.size(1)) continue;
    fail(op, "targets has " + std::to_string(p.targets[i]) + ", expected 0 to " +
                 std::to_string(logits.size(1) - 1));
  }
  p.dtype = logits.dtype();
  p.logits = logits.data();
  p.loss = static_cast<float*>(loss.data());
  p.tokens = logits.size(0);
  p.vocab = logits.size(1);
  p.stride_logits_token = logits.stride(0);
  run(logits, target, p, MISTRAL_KERNELS(cross_entropy));
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", &cross_entropy, py::arg("logits"), py::arg("targets"),
        py::arg("factors").none(true), py::arg("loss"), py::arg("target"));
}

}  // namespace mistral::python

#include "../csrc/rope.h"

#include <pybind11/stl.h>

#include "device.h"
#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

void rope(py::object q, py::object k, py::object v, py::object k_pool, py::object v_pool,
          py::object sequences, py::object frequencies, std::optional<int64_t> window,
          ExecutionTarget target) {
  constexpr const char* op = "rope";
  const RaggedBatch batch(op, Tensor(op, "q", q), Tensor(op, "k", k), Tensor(op, "v", v), k_pool,
                          v_pool, sequences, window);
  for (const Tensor* tensor : {&batch.q, &batch.k}) tensor->expect_no_shared_elements();
  RopeParams p{};
  batch.fill(p);
  p.frequencies = checked_frequencies(batch.q, frequencies);
  run(batch.q, target, p, MISTRAL_KERNELS(rope));
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("rope", &rope, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_pool"),
        py::arg("v_pool"), py::arg("sequences"), py::arg("frequencies"), py::arg("window"),
        py::arg("target"));
}

}  // namespace mistral::python

#include "../csrc/attention.h"

#include <pybind11/stl.h>

#include <cmath>

#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

void attention(py::object q, py::object k, py::object v, py::object k_pool, py::object v_pool,
               py::object sequences, py::object out_, std::optional<int64_t> window,
               std::optional<double> scale, int threads) {
  constexpr const char* op = "attention";
  const RaggedBatch batch(op, q, k, v, k_pool, v_pool, sequences, window);
  const Tensor out(op, "out", out_);
  AttentionParams p{};
  batch.fill(p);
  p.out = out.data();
  p.stride_out_token = out.stride(0);
  p.stride_out_head = out.stride(1);
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim))));
  const py::gil_scoped_release release;
  cpu::attention(p, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_pool"),
        py::arg("v_pool"), py::arg("sequences"), py::arg("out"), py::arg("window"),
        py::arg("scale"), py::arg("threads"));
}

}  // namespace mistral::python

#include "../csrc/embedding.h"

#include "call.h"
#include "device.h"
#include "linear_checks.h"
#include "ops.h"

namespace mistral::python {
namespace {

constexpr const char* kOp = "embedding";

// Checks the ids of tokens in CPU memory. Ids in GPU memory are not read back, because every call
// would then wait for the GPU.
void check_ids(const EmbeddingParams& p) {
  if (p.tokens > 0 && p.weight.rows == 0) fail(kOp, "weight has 0 rows, expected at least 1");
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (p.token_ids[i] >= 0 && p.token_ids[i] < p.weight.rows) continue;
    fail(kOp, "token_ids[" + std::to_string(i) + "] is " + std::to_string(p.token_ids[i]) +
                  ", expected 0 to " + std::to_string(p.weight.rows - 1));
  }
}

Call embedding(py::object token_ids_, py::object values, py::object scales, py::str format,
               py::object out_) {
  const Tensor out(kOp, "out", out_);
  out.expect_shape({-1, -1});
  out.expect_contiguous();
  const Table token_ids(kOp, "token_ids", token_ids_);
  token_ids.expect_shape({out.size(0)});
  token_ids.expect_contiguous();
  token_ids.expect_device_of(out);
  EmbeddingParams p{};
  p.dtype = out.dtype();
  p.token_ids = static_cast<const int64_t*>(token_ids.data());
  p.weight = single_part(kOp, values, scales, format, out);
  p.out = out.data();
  p.tokens = out.size(0);
  p.dim = out.size(1);
  const auto start = [out, p](void*, int32_t*, ExecutionTarget target) {
    run(out, target, p, MISTRAL_KERNELS(embedding));
  };
  if (out.is_cuda()) {
    if (p.weight.format != WeightFormat::plain) {
      expect_readable_by_eights(kOp, p.weight, p.dim);
      out.expect_aligned_rows();
    }
    return {0, 0, start};
  }
  check_ids(p);
  return {0, 0, start, [p] {
            check_ids(p);
            return int64_t{0};
          }};
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def("embedding", &embedding, py::arg("token_ids"), py::arg("values"),
        py::arg("scales").none(true), py::arg("format"), py::arg("out"));
}

}  // namespace mistral::python

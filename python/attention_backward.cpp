#include "../csrc/attention_backward.h"

#include <pybind11/stl.h>

#include "call.h"
#include "device.h"
#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

Call attention_backward(py::object q_, py::object k_, py::object v_, py::object out_,
                        py::object d_out_, py::object lse_, py::object sequences_, py::object d_q_,
                        py::object d_k_, py::object d_v_, std::optional<int64_t> window,
                        std::optional<double> scale) {
  constexpr const char* op = "attention_backward";
  const Tensor q(op, "q", q_), k(op, "k", k_), v(op, "v", v_), out(op, "out", out_),
      d_out(op, "d_out", d_out_), d_q(op, "d_q", d_q_), d_k(op, "d_k", d_k_), d_v(op, "d_v", d_v_);
  const Table lse(op, "lse", lse_, "float32"), sequences(op, "sequences", sequences_);
  check_heads(q, k, v, window.value_or(kNoWindow));
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  for (const Tensor* tensor : {&out, &d_out, &d_q}) {
    tensor->expect_shape({tokens, heads, dim});
    tensor->expect_contiguous();
  }
  for (const Tensor* tensor : {&d_k, &d_v}) {
    tensor->expect_shape({tokens, k.size(1), dim});
    tensor->expect_contiguous();
  }
  for (const Tensor* tensor : {&out, &d_out, &d_q, &d_k, &d_v}) tensor->expect_like(q);
  lse.expect_shape({tokens, heads});
  lse.expect_contiguous();
  lse.expect_device_of(q);
  check_packed(q, sequences, false);

  AttentionBackwardParams p{};
  p.dtype = q.dtype();
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.d_out = d_out.data();
  p.lse = static_cast<const float*>(lse.data());
  p.d_q = d_q.data();
  p.d_k = d_k.data();
  p.d_v = d_v.data();
  p.sequences = static_cast<const Sequence*>(sequences.data());
  p.num_sequences = sequences.size(0);
  p.tokens = tokens;
  p.heads = heads;
  p.kv_heads = k.size(1);
  p.head_dim = dim;
  p.stride_q_token = q.stride(0);
  p.stride_q_head = q.stride(1);
  p.stride_k_token = k.stride(0);
  p.stride_k_head = k.stride(1);
  p.stride_v_token = v.stride(0);
  p.stride_v_head = v.stride(1);
  p.window = window.value_or(kNoWindow);
  p.scale = checked_scale(q, scale);
  if (q.is_cuda()) {
    expect_cuda_heads(q);
    for (const Tensor* tensor : {&q, &k, &v, &out, &d_out, &d_q, &d_k, &d_v}) {
      tensor->expect_aligned_rows();
    }
  }
  return {attention_backward_scratch_bytes(p), 0,
          [p, q](void* workspace, int32_t*, ExecutionTarget target) mutable {
            p.delta = static_cast<float*>(workspace);
            run(q, target, p, MISTRAL_KERNELS(attention_backward));
          }};
}

}  // namespace

void bind_attention_backward(py::module_& m) {
  m.def("attention_backward", &attention_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("d_out"), py::arg("lse"), py::arg("sequences"), py::arg("d_q"),
        py::arg("d_k"), py::arg("d_v"), py::arg("window"), py::arg("scale"));
}

}  // namespace mistral::python

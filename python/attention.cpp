#include "../csrc/attention.h"
#ifdef MISTRAL_CUDA
#include "../csrc/cuda/selection.h"
#endif

#include <pybind11/stl.h>

#include "call.h"
#include "device.h"
#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

#ifdef MISTRAL_CUDA

// Throws ValueError if a device cannot run the prefill kernel in use. The kernel sm90 has
// instructions that only devices of capability 9.0 have.
void expect_prefill_kernel(const char* op, int device) {
  if (cuda::active_prefill() != cuda::Prefill::sm90) return;
  int major = 0, minor = 0;
  cuda::checked(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cuda::checked(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) {
    fail(op, "cuda:" + std::to_string(device) + " has compute capability " + std::to_string(major) +
                 "." + std::to_string(minor) + ", expected 9.0 for attention kernel 'sm90'");
  }
}

void expect_cuda_kernel(const RaggedBatch& batch, const Tensor& out, const AttentionParams& p) {
  expect_cuda_heads(batch.q);
  for (const Tensor* tensor : {&batch.q, &batch.k, &batch.v, &batch.k_pool, &batch.v_pool, &out}) {
    tensor->expect_aligned_rows();
  }
  expect_prefill_kernel(batch.q.op(), batch.q.device_index());
}

cuda::AttentionScratch cuda_scratch(const AttentionParams& p, int device_index) {
  const CurrentDevice device(device_index);
  const int64_t longest = min(p.window, p.pool_rows / p.kv_heads) + p.max_count;
  return cuda::attention_scratch(p, longest);
}

#endif

Call attention(py::object q_, py::object k, py::object v, py::object k_pool, py::object v_pool,
               py::object sequences, py::object out_, std::optional<int64_t> window,
               std::optional<double> scale, std::optional<int64_t> max_count, py::object lse_) {
  constexpr const char* op = "attention";
  const RaggedBatch batch(op, Tensor(op, "q", q_), Tensor(op, "k", k), Tensor(op, "v", v), k_pool,
                          v_pool, sequences, window);
  const Tensor& q = batch.q;
  const Tensor out(op, "out", out_);
  out.expect_shape({q.size(0), q.size(1), q.size(2)});
  out.expect_like(q);
  out.expect_last_axis_contiguous();
  AttentionParams p = batch.table_params();
  p.out = out.data();
  p.stride_out_token = out.stride(0);
  p.stride_out_head = out.stride(1);
  p.scale = checked_scale(q, scale);
  p.max_count = max_count.value_or(p.tokens);
  if (p.max_count < 0) {
    fail(op, "max_count is " + std::to_string(p.max_count) + ", expected 0 or more or None");
  }
  if (!lse_.is_none()) {
    const Table lse(op, "lse", lse_, "float32");
    lse.expect_shape({p.tokens, p.heads});
    lse.expect_contiguous();
    lse.expect_device_of(q);
    p.lse = static_cast<float*>(lse.data());
    // A table in GPU memory is not read back, because every call would then wait for the GPU.
    for (int64_t i = 0; !q.is_cuda() && i < p.num_sequences; ++i) {
      const int64_t position = p.sequences[i].position;
      if (position == 0) continue;
      fail(op, "sequences[" + std::to_string(i) + "].position is " + std::to_string(position) +
                   ", expected 0 with lse");
    }
  }
  int64_t workspace_bytes = 0, counters = 0;
  if (!q.is_cuda()) workspace_bytes = cpu::attention_scratch_bytes(p);
#ifdef MISTRAL_CUDA
  if (q.is_cuda()) {
    expect_cuda_kernel(batch, out, p);
    const cuda::AttentionScratch scratch = cuda_scratch(p, q.device_index());
    p.splits = scratch.splits;
    p.prefill_splits = scratch.prefill_splits;
    workspace_bytes = scratch.partials * int64_t{sizeof(float)};
    counters = scratch.counters;
  }
#endif
  return {workspace_bytes, counters,
          [p, q](void* workspace, int32_t* zeros, ExecutionTarget target) mutable {
            p.partials = static_cast<float*>(workspace);
            p.counters = zeros;
            run(q, target, p, MISTRAL_KERNELS(attention));
          },
          [p] {
            check_rows(op, p);
            return cpu::attention_scratch_bytes(p);
          }};
}

// The head dimensions that all ops support on devices of this type, "cpu" or "cuda".
std::vector<int64_t> head_dims(const std::string& device_type) {
  const auto taken = [&](int64_t dim) {
    if (device_type == "cuda") return cuda::attention_takes_head_dim(dim);
    return device_type == "cpu";
  };
  std::vector<int64_t> dims;
  for (int64_t dim = 1; dim <= kMaxHeadDim; ++dim) {
    if (is_head_dim(dim) && taken(dim)) dims.push_back(dim);
  }
  return dims;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("head_dims", &head_dims, py::arg("device_type"));
  m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_pool"),
        py::arg("v_pool"), py::arg("sequences"), py::arg("out"), py::arg("window"),
        py::arg("scale"), py::arg("max_count"), py::arg("lse") = py::none());
}

}  // namespace mistral::python

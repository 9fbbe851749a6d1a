#include "../csrc/linear.h"

#include <pybind11/stl.h>

#include "call.h"
#include "device.h"
#include "linear_checks.h"
#include "ops.h"
#include "sequences.h"

namespace mistral::python {
namespace {

// Sets the head dimension of a call of linear_rope to that of the pool. Checks that each weight has
// the rows of whole heads, and that wv has as many rows as wk.
void use_heads(const char* op, LinearParams& p, const py::object& k_pool_) {
  const Tensor k_pool(op, "k_pool", k_pool_);
  k_pool.expect_shape({-1, -1});
  p.head_dim = k_pool.size(1);
  if (!is_head_dim(p.head_dim)) {
    fail(op, "k_pool has head dimension " + std::to_string(p.head_dim) +
                 ", expected a multiple of 32 up to " + std::to_string(kMaxHeadDim));
  }
  const Names names = names_of(Epilogue::rope, 3);
  for (int64_t i = 0; i < p.num_parts; ++i) {
    if (p.parts[i].rows % p.head_dim == 0) continue;
    fail(op, std::string(names.values[i]) + " has " + std::to_string(p.parts[i].rows) +
                 " outputs, expected a multiple of the head dimension " +
                 std::to_string(p.head_dim));
  }
  if (p.parts[2].rows != p.parts[1].rows) {
    fail(op, "wv has " + std::to_string(p.parts[2].rows) + " outputs, expected " +
                 std::to_string(p.parts[1].rows) + " like wk");
  }
}

void use_added(const Tensor& x, LinearParams& p, const py::object& added_) {
  if (added_.is_none()) return;
  const Table added(x.op(), "added", added_, "float32");
  added.expect_shape({x.size(0), outputs_of_all(p)});
  added.expect_device_of(x);
  added.expect_last_axis_contiguous();
  p.added = static_cast<const float*>(added.data());
  p.stride_added_token = added.stride(0);
}

struct Op {
  const char* name;
  Epilogue epilogue;
};

constexpr const char* kLinearRope = "linear_rope";
constexpr const char* kLinearArgmax = "linear_argmax";

Op find_op(const std::string& name) {
  for (const Op op :
       {Op{"linear", Epilogue::store}, Op{"linear_residual", Epilogue::add},
        Op{"linear_swiglu", Epilogue::swiglu}, Op{kLinearRope, Epilogue::rope},
        Op{kLinearArgmax, Epilogue::argmax}, Op{"linear_cross_entropy", Epilogue::store}}) {
    if (name == op.name) return op;
  }
  throw py::value_error("op is '" + name + "', expected one that multiplies with weights");
}

#ifdef MISTRAL_CUDA

// Checks the alignment and sizes that 16-byte accesses need.
void expect_cuda_kernel(const char* op, const Tensor& x, const LinearParams& p) {
  const int64_t unit = cuda::row_unit(p);
  if (p.inputs % unit != 0) {
    fail(op, "x has " + std::to_string(p.inputs) + " inputs, expected a multiple of " +
                 std::to_string(unit) + " on a CUDA device");
  }
  x.expect_aligned_rows();
  const Names names = names_of(p.epilogue, static_cast<size_t>(p.num_parts));
  for (int64_t i = 0; i < p.num_parts; ++i) {
    expect_aligned(op, names.values[i], p.parts[i].values, 16);
    expect_aligned(op, names.scales[i], p.parts[i].scales, 4);
  }
  expect_aligned(op, "norm", p.norm, 16);
}

#endif

int64_t scratch_bytes(const Tensor& x, const LinearParams& p) {
#ifdef MISTRAL_CUDA
  if (x.is_cuda()) {
    expect_cuda_kernel(x.op(), x, p);
    const CurrentDevice device(x.device_index());
    return cuda::linear_scratch_bytes(p);
  }
#endif
  return x.is_cuda() ? 0 : cpu::linear_scratch_bytes(p);
}

// Only checks the arguments, for a caller that then multiplies with torch. `out` is None if there
// is no tensor for the result yet, and `added` is None if nothing is added.
void check_linear(const std::string& name, py::object x_, py::list values, py::list scales,
                  py::list formats, py::object norm, double eps, py::object out, py::object added) {
  const Op op = find_op(name);
  const Tensor x(op.name, "x", x_);
  LinearParams p =
      checked_linear(op.name, x, {values, scales, formats}, norm, eps, out, op.epilogue);
  use_added(x, p, added);
}

Call linear(const std::string& name, py::object x_, py::list values, py::list scales,
            py::list formats, py::object norm, double eps, py::object out, py::object added,
            bool exact) {
  const Op op = find_op(name);
  const Tensor x(op.name, "x", x_);
  LinearParams p =
      checked_linear(op.name, x, {values, scales, formats}, norm, eps, out, op.epilogue);
  use_added(x, p, added);
  p.exact |= exact;
  return {scratch_bytes(x, p), 0,
          [x, p](void* workspace, int32_t*, ExecutionTarget target) mutable {
            p.scratch = workspace;
            run(x, target, p, MISTRAL_KERNELS(linear));
          }};
}

// Only checks the arguments, for a caller that then multiplies with torch and calls rope.
void check_linear_rope(py::object x, py::list values, py::list scales, py::list formats,
                       py::object norm, double eps, py::object k_pool) {
  LinearParams p = checked_linear(kLinearRope, Tensor(kLinearRope, "x", x),
                                  {values, scales, formats}, norm, eps, py::none(), Epilogue::rope);
  use_heads(kLinearRope, p, k_pool);
}

Call linear_rope(py::object x_, py::list values, py::list scales, py::list formats, py::object norm,
                 double eps, py::object out, py::object k_pool, py::object v_pool,
                 py::object sequences, py::object frequencies, std::optional<int64_t> window) {
  constexpr const char* op = kLinearRope;
  const Tensor x(op, "x", x_);
  LinearRopeParams p{};
  p.linear = checked_linear(op, x, {values, scales, formats}, norm, eps, out, Epilogue::rope);
  use_heads(op, p.linear, k_pool);

  const int64_t dim = p.linear.head_dim, kv_heads = p.linear.parts[1].rows / dim;
  const int64_t heads = p.linear.parts[0].rows / dim;
  const Tensor all(op, "out", out);
  const RaggedBatch batch(op, all.heads("q", 0, heads, dim), all.heads("k", heads, kv_heads, dim),
                          all.heads("v", heads + kv_heads, kv_heads, dim), k_pool, v_pool,
                          sequences, window);
  batch.fill(p.rope);
  p.rope.frequencies = checked_frequencies(batch.q, frequencies);
  const int64_t workspace_bytes = scratch_bytes(x, p.linear);
  return {workspace_bytes, 0,
          [x, p](void* workspace, int32_t*, ExecutionTarget target) mutable {
            p.linear.scratch = workspace;
            run(x, target, p, MISTRAL_KERNELS(linear_rope));
          },
          [table = batch.table_params(), workspace_bytes] {
            check_rows(op, table);
            return workspace_bytes;
          }};
}

// limit is None if all outputs are candidates.
LinearParams checked_argmax(const Tensor& x, const Weights& weights, const py::object& norm,
                            double eps, std::optional<int64_t> limit, const py::object& out) {
  LinearParams p = checked_linear(x.op(), x, weights, norm, eps, out, Epilogue::argmax);
  const int64_t outputs = outputs_of_all(p);
  p.limit = limit.value_or(outputs);
  const int64_t most = min(outputs, kMaxVocab);
  if (p.limit < 1 || p.limit > most) {
    fail(x.op(), "limit is " + std::to_string(p.limit) + ", expected 1 to " + std::to_string(most));
  }
  return p;
}

// Only checks the arguments, for a caller that then multiplies with torch.
void check_linear_argmax(py::object x, py::list values, py::list scales, py::list formats,
                         py::object norm, double eps, std::optional<int64_t> limit) {
  checked_argmax(Tensor(kLinearArgmax, "x", x), {values, scales, formats}, norm, eps, limit,
                 py::none());
}

Call linear_argmax(py::object x_, py::list values, py::list scales, py::list formats,
                   py::object norm, double eps, std::optional<int64_t> limit, py::object out,
                   py::object token_ids_) {
  constexpr const char* op = kLinearArgmax;
  const Tensor x(op, "x", x_);
  LinearParams p = checked_argmax(x, {values, scales, formats}, norm, eps, limit, out);
  const Table token_ids(op, "token_ids", token_ids_);
  token_ids.expect_shape({x.size(0)});
  token_ids.expect_contiguous();
  token_ids.expect_device_of(x);
  p.token_ids = static_cast<int64_t*>(token_ids.data());
  const auto counters = x.is_cuda() ? int64_t{sizeof(RunningArgmax) / sizeof(int32_t)} : 0;
  return {scratch_bytes(x, p), counters,
          [x, p](void* workspace, int32_t* zeros, ExecutionTarget target) mutable {
            p.scratch = workspace;
            p.running = reinterpret_cast<RunningArgmax*>(zeros);
            run(x, target, p, MISTRAL_KERNELS(linear));
          }};
}

#ifdef MISTRAL_CUDA

void dequantize(py::object values, py::object scales, py::str format, py::object out_,
                ExecutionTarget target) {
  constexpr const char* op = "dequantize";
  const Tensor out(op, "out", out_);
  if (!out.is_cuda()) fail(op, "tensors are on cpu, expected a CUDA device");
  out.expect_shape({-1, -1});
  out.expect_contiguous();
  out.expect_aligned_rows();
  DequantizeParams p{};
  p.dtype = out.dtype();
  p.weight = single_part(op, values, scales, format, out);
  p.out = out.data();
  p.count = out.size(0);
  p.inputs = out.size(1);
  if (p.weight.format == WeightFormat::plain) {
    fail(op, "format of weight is 'plain', expected a format with scales");
  }
  expect_readable_by_eights(op, p.weight, p.inputs);
  if (p.weight.rows != p.count) {
    fail(op, "out has " + std::to_string(p.count) + " rows, expected " +
                 std::to_string(p.weight.rows) + " like weight");
  }
  run<DequantizeParams>(out, target, p, nullptr, &cuda::dequantize);
}

#endif

// The rows of kFormats, as dictionaries by the name of the format.
py::dict weight_formats() {
  py::dict formats;
  for (const FormatInfo& format : kFormats) {
    py::dict facts;
    facts["value_dtype"] = format.value_dtype;
    facts["scale_dtype"] = format.scale_dtype;
    facts["bits"] = format.bits;
    facts["group_scales"] = format.group_scales;
    facts["least_group"] = format.least_group;
    facts["most_group"] = format.most_group;
    formats[format.name] = facts;
  }
  return formats;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("check_linear", &check_linear, py::arg("op"), py::arg("x"), py::arg("values"),
        py::arg("scales"), py::arg("formats"), py::arg("norm").none(true), py::arg("eps"),
        py::arg("out").none(true), py::arg("added").none(true));
  m.def("linear", &linear, py::arg("op"), py::arg("x"), py::arg("values"), py::arg("scales"),
        py::arg("formats"), py::arg("norm").none(true), py::arg("eps"), py::arg("out"),
        py::arg("added") = py::none(), py::arg("exact") = false);
  m.def("check_linear_rope", &check_linear_rope, py::arg("x"), py::arg("values"), py::arg("scales"),
        py::arg("formats"), py::arg("norm").none(true), py::arg("eps"), py::arg("k_pool"));
  m.def("linear_rope", &linear_rope, py::arg("x"), py::arg("values"), py::arg("scales"),
        py::arg("formats"), py::arg("norm").none(true), py::arg("eps"), py::arg("out"),
        py::arg("k_pool"), py::arg("v_pool"), py::arg("sequences"), py::arg("frequencies"),
        py::arg("window"));
  m.def("check_linear_argmax", &check_linear_argmax, py::arg("x"), py::arg("values"),
        py::arg("scales"), py::arg("formats"), py::arg("norm").none(true), py::arg("eps"),
        py::arg("limit"));
  m.def("linear_argmax", &linear_argmax, py::arg("x"), py::arg("values"), py::arg("scales"),
        py::arg("formats"), py::arg("norm").none(true), py::arg("eps"), py::arg("limit"),
        py::arg("out"), py::arg("token_ids"));
#ifdef MISTRAL_CUDA
  m.def("dequantize", &dequantize, py::arg("values"), py::arg("scales"), py::arg("format"),
        py::arg("out"), py::arg("target"));
#endif
  m.def("exact_products", [] { return exact_products(); });
  m.def("set_exact_products", [](bool exact) { exact_products() = exact; }, py::arg("exact"));
  m.def("weight_formats", &weight_formats);
}

}  // namespace mistral::python

// The module `_emulator`: the ops of mistral_ext._C, with their CUDA kernels run by the emulator on
// tensors of the CPU; the emulator's settings and counters; and the kernels that test it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>

#include "../../csrc/attention.h"
#include "../../csrc/cuda/selection.h"
#include "../../csrc/linear.h"
#include "../../python/device.h"
#include "../../python/ops.h"
#include "memory.h"
#include "run.h"
#include "runtime.h"
#include "sanitizer.h"
#include "test_kernels.h"

namespace py = pybind11;
using namespace mistral;

namespace {

const std::map<std::string, cudaError_t (*)(const cuda::Arguments&)> kTestKernels = {
    {"mma_bf16", &cuda::run_mma_bf16},
    {"mma_f16", &cuda::run_mma_f16},
    {"ldmatrix", &cuda::run_ldmatrix},
    {"ldmatrix_transposed", &cuda::run_ldmatrix_transposed},
    {"shuffles", &cuda::run_shuffles},
    {"votes", &cuda::run_votes},
    {"cp_async", &cuda::run_cp_async},
    {"cp_async_words", &cuda::run_cp_async_words},
    {"one_lane_more", &cuda::run_one_lane_more},
    {"bits", &cuda::run_bits},
    {"pipeline", &cuda::run_pipeline},
    {"atomics", &cuda::run_atomics},
    {"indices", &cuda::run_indices},
    {"strided_copy", &cuda::run_strided_copy},
    {"shared_stride", &cuda::run_shared_stride},
    {"shared_stride_8", &cuda::run_shared_stride_8},
    {"uninitialised", &cuda::run_uninitialised},
    {"shape", &cuda::run_shape},
    {"order_of_overlap", &cuda::run_order_of_overlap},
    {"tma_2d", &cuda::run_tma_2d},
    {"tma_3d", &cuda::run_tma_3d},
    {"tensor_map", &cuda::run_tensor_map},
    {"wgmma", &cuda::run_wgmma},
    {"wgmma_groups", &cuda::run_wgmma_groups},
    {"mbarrier", &cuda::run_mbarrier},
    {"cp_async_barrier", &cuda::run_cp_async_barrier},
    {"named_barriers", &cuda::run_named_barriers},
    {"registers", &cuda::run_registers},
    {"misuse", &cuda::run_misuse},
    {"began_too_early", &cuda::run_began_too_early},
    {"copied_too_early", &cuda::run_copied_too_early},
    {"divergent_barrier", &cuda::run_divergent_barrier},
    {"divergent_shuffle", &cuda::run_divergent_shuffle},
    {"exited_lane", &cuda::run_exited_lane},
    {"exited_thread", &cuda::run_exited_thread},
    {"looked_up_too_early", &cuda::run_looked_up_too_early},
    {"misaligned", &cuda::run_misaligned},
    {"misaligned_part", &cuda::run_misaligned_part},
    {"missing_barrier", &cuda::run_missing_barrier},
    {"missing_copy_barrier", &cuda::run_missing_copy_barrier},
    {"missing_fence", &cuda::run_missing_fence},
    {"missing_fence_after", &cuda::run_missing_fence_after},
    {"missing_refill_barrier", &cuda::run_missing_refill_barrier},
    {"missing_syncwarp", &cuda::run_missing_syncwarp},
    {"missing_wait", &cuda::run_missing_wait},
    {"never_waits", &cuda::run_never_waits},
    {"out_of_bounds_read", &cuda::run_out_of_bounds_read},
    {"out_of_bounds_shared", &cuda::run_out_of_bounds_shared},
    {"out_of_bounds_write", &cuda::run_out_of_bounds_write},
    {"outside_of_tensors", &cuda::run_outside_of_tensors},
    {"past_shared", &cuda::run_past_shared},
    {"reused_too_early", &cuda::run_reused_too_early},
    {"row_outside", &cuda::run_row_outside},
    {"unshared_store", &cuda::run_unshared_store},
    {"written_constant", &cuda::run_written_constant},
    {"wrong_mask", &cuda::run_wrong_mask},
    {"wrong_row", &cuda::run_wrong_row},
    {"wrong_wait", &cuda::run_wrong_wait},
    {"changed_operand", &cuda::run_changed_operand},
    {"early_proxy_fence", &cuda::run_early_proxy_fence},
    {"loaded_too_early", &cuda::run_loaded_too_early},
    {"lone_arrival", &cuda::run_lone_arrival},
    {"lone_release", &cuda::run_lone_release},
    {"missing_expect", &cuda::run_missing_expect},
    {"missing_init_fence", &cuda::run_missing_init_fence},
    {"missing_operand_settle", &cuda::run_missing_operand_settle},
    {"missing_proxy_fence", &cuda::run_missing_proxy_fence},
    {"missing_reader_fence", &cuda::run_missing_reader_fence},
    {"missing_settle", &cuda::run_missing_settle},
    {"missing_settle_before", &cuda::run_missing_settle_before},
    {"missing_warp", &cuda::run_missing_warp},
    {"missing_warpgroup_barrier", &cuda::run_missing_warpgroup_barrier},
    {"missing_wgmma_fence", &cuda::run_missing_wgmma_fence},
    {"missing_wgmma_wait", &cuda::run_missing_wgmma_wait},
    {"released_too_early", &cuda::run_released_too_early},
    {"too_many_registers", &cuda::run_too_many_registers},
    {"touched_accumulators", &cuda::run_touched_accumulators},
    {"wrong_bytes", &cuda::run_wrong_bytes},
    {"wrong_count", &cuda::run_wrong_count},
    {"wrong_parity", &cuda::run_wrong_parity},
    {"wrong_stride", &cuda::run_wrong_stride},
};

emulator::Delivery delivery(const std::string& name) {
  if (name == "late") return emulator::Delivery::late;
  if (name == "early") return emulator::Delivery::early;
  throw py::value_error("copies is '" + name + "', expected late or early");
}

void configure(uint64_t seed, const std::string& copies, int multiprocessors, int workers,
               int capability) {
  emulator::settings() = {seed, delivery(copies), multiprocessors, workers, capability};
}

// What has been launched since the last call, in order.
py::list take_launches() {
  py::list list;
  for (const emulator::Record& r : emulator::records()) {
    py::dict entry;
    entry["kernel"] = r.kernel;
    entry["grid"] = py::make_tuple(r.grid.x, r.grid.y, r.grid.z);
    entry["block"] = py::make_tuple(r.block.x, r.block.y, r.block.z);
    entry["shared_bytes"] = r.shared_bytes;
    entry["loaded_bytes"] = r.counters.loaded_bytes;
    entry["stored_bytes"] = r.counters.stored_bytes;
    entry["load_requests"] = r.counters.load_requests;
    entry["store_requests"] = r.counters.store_requests;
    entry["load_sectors"] = r.counters.load_sectors;
    entry["store_sectors"] = r.counters.store_sectors;
    entry["shared_requests"] = r.counters.shared_requests;
    entry["shared_conflicts"] = r.counters.shared_conflicts;
    entry["mma"] = r.counters.mma;
    entry["wgmma_flops"] = r.counters.wgmma_flops;
    entry["tma_bytes"] = r.counters.tma_bytes;
    list.append(entry);
  }
  emulator::records().clear();
  return list;
}

// The cudaError_t of its launch.
int run_test_kernel(const std::string& name, uintptr_t in, uintptr_t out, int64_t n) {
  const py::gil_scoped_release release;
  return kTestKernels.at(name)(
      {reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), n});
}

// Of tensors' addresses: a build without CUDA has no binding of it.
int dequantize(const std::string& dtype, const std::string& format, uintptr_t values,
               uintptr_t scales, uintptr_t out, int64_t rows, int64_t inputs, int64_t group) {
  const std::map<std::string, DType> dtypes = {
      {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}};
  const auto named = [&](const FormatInfo& one) { return one.name == format; };
  const auto index = std::find_if(kFormats, kFormats + kNumFormats, named) - kFormats;
  DequantizeParams p{};
  p.dtype = dtypes.at(dtype);
  p.weight = {reinterpret_cast<const void*>(values), reinterpret_cast<const void*>(scales), rows,
              static_cast<WeightFormat>(index), group};
  p.out = reinterpret_cast<void*>(out);
  p.count = rows;
  p.inputs = inputs;
  const py::gil_scoped_release release;
  return cuda::dequantize(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.attr("sanitized") = emulator::kSanitized;
  m.def("configure", &configure, py::arg("seed") = 0, py::arg("copies") = "late",
        py::arg("multiprocessors") = 4, py::arg("workers") = 2, py::arg("capability") = 89);
  m.def("take_launches", &take_launches);
  m.def(
      "allocate",
      [](uintptr_t begin, size_t bytes, const std::string& name, bool constant) {
        emulator::allocations().add(reinterpret_cast<const void*>(begin), bytes, name, constant);
      },
      py::arg("begin"), py::arg("bytes"), py::arg("name"), py::arg("constant") = false);
  m.def("begin_stream", &emulator::begin_stream);
  m.def("end_stream", &emulator::end_stream, py::call_guard<py::gil_scoped_release>());
  m.def("free_all", [] { emulator::allocations().clear(); });
  m.def("run_test_kernel", &run_test_kernel, py::arg("name"), py::arg("inputs"), py::arg("out"),
        py::arg("n"));
  m.def("make_fail", [](const std::string& function, int status) {
    emulator::make_fail(function, cudaError_t(status));
  });
  m.def("last_error", [] { return int(cudaGetLastError()); });
  m.def("fail_launch", [](const char* op, int index, int status) {
    python::fail_launch(op, index, cudaError_t(status));
  });
  m.def("select_attention", &cuda::select_prefill, py::arg("name"));
  m.def("dequantize", &dequantize);
  python::bind_call(m);
  python::bind_ops(m);
}

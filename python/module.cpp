// The compiled module `mistral_ext._C`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../csrc/cpu/isa.h"
#include "../csrc/linear.h"
#include "device.h"
#include "ops.h"
#ifdef MISTRAL_CUDA
#include "../csrc/attention.h"
#include "../csrc/cuda/common/device.h"
#include "../csrc/cuda/selection.h"
#endif

namespace py = pybind11;
using namespace mistral;

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::name(isa));
  return names;
}

[[noreturn]] void fail_unknown(const char* argument, const std::string& name) {
  throw py::value_error("linear_rounds: " + std::string(argument) + " is '" + name +
                        "', expected one that linear takes");
}

DType dtype_of(const std::string& name) {
  if (name == "torch.float32") return DType::f32;
  if (name == "torch.bfloat16") return DType::bf16;
  if (name == "torch.float16") return DType::f16;
  fail_unknown("dtype", name);
}

WeightFormat format_of(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return static_cast<WeightFormat>(i);
  }
  fail_unknown("format", name);
}

// Whether `linear` rounds activations to 8 bits (csrc/linear.h). Takes a dtype and a number of
// tokens instead of a tensor, because torch.compile traces with tensors that have no memory, and
// Tensor (tensor.h) needs an address.
bool linear_rounds(const py::object& dtype, const std::string& format, int64_t tokens) {
  return cpu::linear_rounds(dtype_of(py::str(dtype)), format_of(format), tokens);
}

#ifdef MISTRAL_CUDA
std::vector<std::string> attention_kernels() {
  std::vector<std::string> names;
  for (const cuda::Prefill prefill : cuda::built_prefills())
    names.emplace_back(cuda::name(prefill));
  return names;
}
#endif

// None in a build without CUDA, else the pair (list, problem) of cuda::Devices.
py::object cuda_devices() {
#ifdef MISTRAL_CUDA
  const cuda::Devices found = cuda::devices();
  py::list list;
  for (const cuda::Device& device : found.list) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    list.append(entry);
  }
  return py::make_tuple(list, found.problem);
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mistral_ext; call them through mistral_ext.ops.";
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", [] { return cpu::name(cpu::active_isa()); });
  m.def("select_isa", &cpu::select_isa, py::arg("name"));
  m.def("linear_rounds", &linear_rounds, py::arg("dtype"), py::arg("format"), py::arg("tokens"));
  m.def("cuda_devices", &cuda_devices);
#ifdef MISTRAL_CUDA
  m.attr("cuda_architectures") = MISTRAL_CUDA;
  m.def("overlapping", &cuda::overlapping);
  m.def("overlap", &cuda::overlap, py::arg("wanted"));
  m.def("capture_id", &python::capture_id, py::arg("target"));
  m.def("attention_kernels", &attention_kernels);
  m.def("active_attention", [] { return cuda::name(cuda::active_prefill()); });
  m.def("select_attention", &cuda::select_prefill, py::arg("name"));
#else
  m.attr("cuda_architectures") = py::none();
#endif
  python::bind_call(m);
  python::bind_ops(m);
}

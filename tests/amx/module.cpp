// The module `_amx`: `attention`, `linear`, `linear_backward` and `linear_rope` of mistral_ext._C
// with the kernels of AMX, on emulated instructions, and these on their own. Errors of the
// emulation are exceptions here.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../../csrc/attention.h"
#include "../../csrc/linear.h"
#include "../../python/ops.h"
#include "emulation.h"
#include "trap.h"

namespace py = pybind11;

namespace mistral::cpu {
namespace {

void check() {
  const std::string error = emulated::take_error();
  if (!error.empty()) throw std::runtime_error(error);
}

// Runs a kernel, which has to leave the tiles of all threads as they were.
template <class Kernel>
void run(const Kernel& kernel) {
  const int before = emulated::configured_threads();
  {
    const vex::Trap trap(emulated::execute);
    kernel();
  }
  check();
  if (emulated::configured_threads() != before) {
    throw std::runtime_error("a thread has not released its tiles");
  }
}

}  // namespace

namespace amx {
int64_t linear_scratch_bytes(const LinearParams& p);
void linear(const LinearParams& p, int threads);
int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p);
void linear_backward(const LinearBackwardParams& p, int threads);
void rope(const RopeParams& p, int threads);
int64_t attention_scratch_bytes(const AttentionParams& p);
void attention(const AttentionParams& p, int threads);
}  // namespace amx

// The bindings call these.
int64_t linear_scratch_bytes(const LinearParams& p) { return amx::linear_scratch_bytes(p); }
void linear(const LinearParams& p, int threads) {
  run([&] { amx::linear(p, threads); });
}

int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p) {
  return amx::linear_backward_scratch_bytes(p);
}
void linear_backward(const LinearBackwardParams& p, int threads) {
  run([&] { amx::linear_backward(p, threads); });
}

int64_t attention_scratch_bytes(const AttentionParams& p) {
  return amx::attention_scratch_bytes(p);
}
void attention(const AttentionParams& p, int threads) {
  run([&] { amx::attention(p, threads); });
}

void linear_rope(const LinearRopeParams& p, int threads) {
  linear(p.linear, threads);
  amx::rope(p.rope, threads);
}

}  // namespace mistral::cpu

using namespace mistral;
using namespace mistral::cpu;

PYBIND11_MODULE(_amx, m) {
  python::bind_call(m);
  python::bind_attention(m);
  python::bind_linear(m);
  python::bind_linear_backward(m);
  m.def("configure", [](const py::bytes& bytes) {
    TileConfig config;
    const std::string copy = bytes;
    if (copy.size() != sizeof config) throw py::value_error("expected 64 bytes");
    memcpy(&config, copy.data(), sizeof config);
    emulated::configure(config);
    check();
  });
  m.def("configure_whole_tiles", [] { emulated::configure(whole_tiles()); });
  m.def("configuration", [] {
    const TileConfig config = emulated::configuration();
    return py::bytes(reinterpret_cast<const char*>(&config), sizeof config);
  });
  m.def("release", [] { emulated::configure(TileConfig{}); });
  m.def("zero", [](int tile) {
    emulated::zero(tile);
    check();
  });
  m.def("load", [](int tile, uintptr_t p, int64_t stride) {
    emulated::load(tile, reinterpret_cast<const void*>(p), stride);
    check();
  });
  m.def("store", [](int tile, uintptr_t p, int64_t stride) {
    emulated::store(tile, reinterpret_cast<void*>(p), stride);
    check();
  });
  m.def("dot_bf16", [](int c, int a, int b) {
    emulated::dot_bf16(c, a, b);
    check();
  });
  m.def("take_counts", [] {
    const emulated::Counts counts = emulated::take_counts();
    py::dict out;
    out["configured"] = counts.configured;
    out["loads"] = counts.loads;
    out["stores"] = counts.stores;
    out["dots"] = counts.dots;
    return out;
  });
}

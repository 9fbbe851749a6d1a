// The bindings call cpu::op for tensors of the CPU. In this module, that is the CUDA kernel.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ops.h"
#include "memory.h"

namespace mistral::cpu {
namespace {

// More keys than tests have: enough that a decode is split wherever there are blocks to spare.
constexpr int64_t kLongest = 4096;

void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": launch failed with cudaError_t " +
                             std::to_string(status));
  }
}

void check_counters(const std::string& op, const std::vector<int32_t>& counters) {
  for (const int32_t counter : counters) {
    if (counter != 0) throw std::runtime_error(op + ": a counter was not left at zero");
  }
}

void add_scratch(const LinearParams& p) {
  const auto bytes = static_cast<size_t>(cuda::linear_scratch_bytes(p));
  if (bytes == 0) return;
  emulator::allocations().add(p.scratch, bytes, "scratch");
  memset(p.scratch, 0xff, bytes);  // NaN
}

}  // namespace

// The scratch of the CUDA kernel is made here.
int64_t attention_scratch_bytes(const AttentionParams&) { return 0; }
void attention(const AttentionParams& given, int) {
  AttentionParams p = given;
  const cuda::AttentionScratch scratch =
      cuda::attention_scratch(p, min(p.window, kLongest) + p.max_count);
  std::vector<float> partials(static_cast<size_t>(scratch.partials), NAN);
  std::vector<int32_t> counters(static_cast<size_t>(scratch.counters), 0);
  p.splits = scratch.splits;
  p.prefill_splits = scratch.prefill_splits;
  p.partials = partials.data();
  p.counters = counters.data();
  auto& allocations = emulator::allocations();
  allocations.add(p.partials, partials.size() * sizeof(float), "partials");
  allocations.add(p.counters, counters.size() * sizeof(int32_t), "counters");
  check("attention", cuda::attention(p, nullptr));
  check_counters("attention", counters);
}
int64_t linear_scratch_bytes(const LinearParams& p) { return cuda::linear_scratch_bytes(p); }
void linear(const LinearParams& given, int) {
  LinearParams p = given;
  add_scratch(p);
  std::vector<int32_t> counters(sizeof(RunningArgmax) / sizeof(int32_t), 0);
  p.running = reinterpret_cast<RunningArgmax*>(counters.data());
  emulator::allocations().add(p.running, sizeof(RunningArgmax), "running argmax");
  check("linear", cuda::linear(p, nullptr));
  check_counters("linear", counters);
}
void linear_rope(const LinearRopeParams& p, int) {
  add_scratch(p.linear);
  check("linear_rope", cuda::linear_rope(p, nullptr));
}
#define OP(op, Params) \
  void op(const Params& p, int) { check(#op, cuda::op(p, nullptr)); }
#define OP_WITH_SCRATCH(op, Params)  // above
#define OP_OF_ONE_KERNEL(op, Params) OP(op, Params)
#define OP_ON_CPU(op, Params) \
  void op(const Params&, int) { throw std::logic_error(#op " has no CUDA kernel"); }
#define OP_ON_CPU_WITH_SCRATCH(op, Params) \
  OP_ON_CPU(op, Params)                    \
  int64_t op##_scratch_bytes(const Params&) { return 0; }
#include "../../csrc/ops.def"

}  // namespace mistral::cpu

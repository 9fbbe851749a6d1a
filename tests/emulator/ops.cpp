// The bindings call cpu::op for tensors of the CPU. In this module, that is the CUDA kernel.
#include <cuda_runtime_api.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ops.h"
#include "memory.h"
#include "run.h"

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

// Memory that kernels of an op get beside its arguments.
struct Scratch {
  std::vector<float> partials;
  std::vector<int32_t> counters;
};

std::shared_ptr<Scratch> make_scratch(int64_t partials, int64_t counters) {
  auto scratch = std::make_shared<Scratch>();
  scratch->partials.assign(static_cast<size_t>(partials), NAN);
  scratch->counters.assign(static_cast<size_t>(counters), 0);
  auto& allocations = emulator::allocations();
  allocations.add(scratch->partials.data(), scratch->partials.size() * sizeof(float), "partials");
  allocations.add(scratch->counters.data(), scratch->counters.size() * sizeof(int32_t), "counters");
  return scratch;
}

// Checks the counters when the op's kernels are done. The memory lives until then, even if only the
// first of them were launched.
void finish(const char* op, cudaError_t status, const std::shared_ptr<Scratch>& scratch) {
  emulator::when_done([op, status, scratch] {
    if (status != cudaSuccess) return;
    for (const int32_t counter : scratch->counters) {
      if (counter == 0) continue;
      throw std::runtime_error(std::string(op) + ": a counter was not left at zero");
    }
  });
  check(op, status);
}

// Lets kernels access an op's scratch, if it has any.
template <class Params>
void add_scratch(const Params&) {}
void add_scratch(const AttentionBackwardParams& p) {
  const auto bytes = static_cast<size_t>(attention_backward_scratch_bytes(p));
  emulator::allocations().add(p.delta, bytes, "delta");
}
void add_scratch(const LinearParams& p) {
  const auto bytes = static_cast<size_t>(cuda::linear_scratch_bytes(p));
  if (bytes > 0) emulator::allocations().add(p.scratch, bytes, "scratch");
}
void add_scratch(const SampleParams& p) {
  const auto elements = static_cast<size_t>(p.num_rows * p.vocab_size);
  if (elements == 0) return;
  emulator::allocations().add(p.keys, elements * sizeof *p.keys, "keys");
  emulator::allocations().add(p.weights, elements * sizeof *p.weights, "weights");
}

}  // namespace

// The scratch of the CUDA kernel is made here.
int64_t attention_scratch_bytes(const AttentionParams&) { return 0; }
void attention(const AttentionParams& given, int) {
  AttentionParams p = given;
  const cuda::AttentionScratch wanted =
      cuda::attention_scratch(p, min(p.window, kLongest) + p.max_count);
  const auto scratch = make_scratch(wanted.partials, wanted.counters);
  p.splits = wanted.splits;
  p.prefill_splits = wanted.prefill_splits;
  p.partials = scratch->partials.data();
  p.counters = scratch->counters.data();
  finish("attention", cuda::attention(p, nullptr), scratch);
}
int64_t linear_scratch_bytes(const LinearParams& p) { return cuda::linear_scratch_bytes(p); }
void linear(const LinearParams& given, int) {
  LinearParams p = given;
  add_scratch(p);
  const auto scratch = make_scratch(0, sizeof(RunningArgmax) / sizeof(int32_t));
  p.running = reinterpret_cast<RunningArgmax*>(scratch->counters.data());
  finish("linear", cuda::linear(p, nullptr), scratch);
}
void linear_rope(const LinearRopeParams& p, int) {
  add_scratch(p.linear);
  check("linear_rope", cuda::linear_rope(p, nullptr));
}
#define OP(op, Params)                \
  void op(const Params& p, int) {     \
    add_scratch(p);                   \
    check(#op, cuda::op(p, nullptr)); \
  }
#define OP_WITH_SCRATCH(op, Params)  // above
#define OP_OF_ONE_KERNEL(op, Params) OP(op, Params)
#define OP_ON_CPU(op, Params) \
  void op(const Params&, int) { throw std::logic_error(#op " has no CUDA kernel"); }
#define OP_OF_ONE_KERNEL_ON_CPU(op, Params) OP_ON_CPU(op, Params)
#define OP_ON_CPU_WITH_SCRATCH(op, Params) \
  OP_ON_CPU(op, Params)                    \
  int64_t op##_scratch_bytes(const Params&) { return 0; }
#include "../../csrc/ops.def"

}  // namespace mistral::cpu

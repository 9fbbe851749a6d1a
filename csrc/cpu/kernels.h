// The table of CPU kernels, one per instruction set.
//
// A kernel file is compiled once per instruction set, with the compiler's flags for this set.
// MISTRAL_ISA names a namespace for the set, which keeps the copies apart. dispatch.cpp picks the
// table at run time. Kernel files call no templates or inline functions of the standard library,
// because the linker keeps one copy of such a function, and this copy could have instructions that
// the processor lacks.
#pragma once

#include "../ops.h"

namespace mistral::cpu {

struct Kernels {
#define OP(op, Params) void (*op)(const Params&, int threads);
#define OP_WITH_SCRATCH(op, Params)       \
  void (*op)(const Params&, int threads); \
  int64_t (*op##_scratch_bytes)(const Params&);
#include "../ops.def"
  bool (*linear_rounds)(DType dtype, WeightFormat format, int64_t tokens);
  Rank (*highest_rank)(const float* logits, int64_t vocab_size);  // part of `sample`
};

// The table in use. Throws std::invalid_argument as isa.h says. Call this before a loop of tasks,
// so that no task throws, and all tasks use one set.
const Kernels& active_kernels();

}  // namespace mistral::cpu

#ifdef MISTRAL_ISA
namespace mistral::cpu::MISTRAL_ISA {
#define OP(op, Params) void op(const Params& p, int threads);
#define OP_WITH_SCRATCH(op, Params)      \
  void op(const Params& p, int threads); \
  int64_t op##_scratch_bytes(const Params& p);
#include "../ops.def"
bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens);
Rank highest_rank(const float* logits, int64_t vocab_size);
}  // namespace mistral::cpu::MISTRAL_ISA
#endif

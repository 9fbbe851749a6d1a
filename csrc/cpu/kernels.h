// A table of CPU kernels for each instruction set.
//
// A kernel file that uses the macro MISTRAL_ISA is compiled once for each instruction set, with the
// compiler's flags for this set. MISTRAL_ISA is then the name of the set and of a namespace, which
// keeps the compiled versions of a function apart. dispatch.cpp picks a table at run time. Kernel
// files call no functions of the standard library that are templates or inline, because the linker
// keeps only one compiled version of such a function, and this version could have instructions that
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
  Rank (*highest_rank)(const float* logits, int64_t vocab_size);  // sample.cpp calls it
};

// The table of the active set. Throws std::invalid_argument where active_isa does (isa.h). Code
// whose parallel tasks need the table calls this function before it starts them. Then no task
// throws, and all tasks use the same set.
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

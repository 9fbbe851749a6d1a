// The table of CPU kernels, one per instruction set.
//
// Every kernel file is compiled once per set, with the compiler's flags for it and with
// MISTRAL_ISA naming the namespace that keeps the copies apart. dispatch.cpp picks the table at
// run time. Kernel files use no templates or inline functions of the standard library: the
// linker keeps one copy of those, and it could be one that the processor cannot run.
#pragma once

#include "../attention.h"
#include "../linear.h"
#include "../rms_norm.h"
#include "../rope.h"
#include "../swiglu.h"

namespace mistral::cpu {

struct Kernels {
  void (*attention)(const AttentionParams&, int threads);
  int64_t (*attention_scratch_bytes)(const AttentionParams&);
  void (*linear)(const LinearParams&, int threads);
  int64_t (*linear_scratch_bytes)(const LinearParams&);
  void (*rms_norm)(const RmsNormParams&, int threads);
  void (*rope)(const RopeParams&, int threads);
  void (*swiglu)(const SwigluParams&, int threads);
};

}  // namespace mistral::cpu

#ifdef MISTRAL_ISA
namespace mistral::cpu::MISTRAL_ISA {
void attention(const AttentionParams& p, int threads);
int64_t attention_scratch_bytes(const AttentionParams& p);
void linear(const LinearParams& p, int threads);
int64_t linear_scratch_bytes(const LinearParams& p);
void rms_norm(const RmsNormParams& p, int threads);
void rope(const RopeParams& p, int threads);
void swiglu(const SwigluParams& p, int threads);
}  // namespace mistral::cpu::MISTRAL_ISA
#endif

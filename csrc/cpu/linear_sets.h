// The instruction sets that have kernels of their own only for `linear`. For all other ops, each of
// them uses the kernels of the set before it in isa.h. cmake/cpu.cmake lists these sets too.
#pragma once

#include "../linear.h"
#include "isa.h"

namespace mistral::cpu {

#define MISTRAL_LINEAR_SETS(F) \
  F(avxvnni)                   \
  F(neon_dotprod)              \
  F(neon_i8mm)

// A binary that holds a set defines these functions in the namespace of the set.
#define DECLARE(set)                                                    \
  namespace set {                                                       \
  void linear(const LinearParams& p, int threads);                      \
  int64_t linear_scratch_bytes(const LinearParams& p);                  \
  bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens); \
  }
MISTRAL_LINEAR_SETS(DECLARE)
#undef DECLARE

constexpr bool is_linear_set(Isa isa) {
  switch (isa) {
#define CASE(set) case Isa::set:
    MISTRAL_LINEAR_SETS(CASE)
#undef CASE
    return true;
    default: return false;
  }
}

}  // namespace mistral::cpu

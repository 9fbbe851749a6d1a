// The instruction sets that the CPU kernels are compiled for, and the active set.
#pragma once

#include <string>
#include <vector>

namespace mistral::cpu {

// Scalar comes first, then the sets of x86, then the sets of aarch64. Within x86 and within aarch64
// they are listed from slowest to fastest. The order matters: the last supported set is the
// default, and the build leaves out the sets after MISTRAL_NEWEST_ISA.
#define MISTRAL_ISAS(F) \
  F(scalar)             \
  F(avx2)               \
  F(avxvnni)            \
  F(avx512)             \
  F(avx512_bf16)        \
  F(amx)                \
  F(neon)               \
  F(neon_dotprod)       \
  F(neon_bf16)          \
  F(neon_i8mm)

enum class Isa {
#define NAME(isa) isa,
  MISTRAL_ISAS(NAME)
#undef NAME
};

const char* name(Isa isa);

// The sets that this binary holds and this processor can run, from slowest to fastest.
std::vector<Isa> supported_isas();

// The active set. Before the first call of select_isa, it is the set that the environment variable
// MISTRAL_EXT_ISA names or, if the variable is unset or empty, the fastest supported set. If the
// variable names an unsupported set, this function, select_isa and the ops that depend on the set
// throw std::invalid_argument.
Isa active_isa();

// Makes the supported set of this name the active set. Throws std::invalid_argument if there is
// none.
void select_isa(const std::string& name);

}  // namespace mistral::cpu

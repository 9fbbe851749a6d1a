// The instruction sets that the CPU kernels are compiled for, and the set in use.
#pragma once

#include <string>
#include <vector>

namespace mistral::cpu {

// Slowest first; the sets of x86 come before the sets of aarch64.
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

// The supported sets, slowest first: those that this binary holds and this processor runs.
std::vector<Isa> supported_isas();

// The set in use. It is the set that the environment variable MISTRAL_EXT_ISA names, else the
// fastest supported set. If the variable names an unsupported set, this function and every op throw
// std::invalid_argument.
Isa active_isa();

// Throws std::invalid_argument for a name that is unknown or that this processor cannot run.
void select_isa(const std::string& name);

}  // namespace mistral::cpu

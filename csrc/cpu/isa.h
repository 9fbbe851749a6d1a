// The instruction sets that the CPU kernels are compiled for, and the active set.
#pragma once

#include <string>
#include <vector>

namespace mistral::cpu {

// Scalar, then the sets of x86, then those of aarch64, each from slowest to fastest.
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

// The supported sets, from slowest to fastest: this binary holds them and this processor runs them.
std::vector<Isa> supported_isas();

// The active set. Until select_isa changes it, it is the set that the environment variable
// MISTRAL_EXT_ISA names, else the fastest supported set. If the variable names an unsupported set,
// this function, select_isa and the ops that depend on the set throw std::invalid_argument.
Isa active_isa();

// Throws std::invalid_argument if no supported set has this name.
void select_isa(const std::string& name);

}  // namespace mistral::cpu

// The instruction sets that the CPU kernels are compiled for, and the active set.
#pragma once

#include <string>
#include <vector>

namespace mistral::cpu {

// From slowest to fastest. The sets of x86 come before the sets of aarch64.
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

// The active set. It is the set that the environment variable MISTRAL_EXT_ISA names, else the
// fastest supported set. If the variable names an unsupported set, this function and every op throw
// std::invalid_argument.
Isa active_isa();

// Throws std::invalid_argument if the name is unknown or the processor cannot run the set.
void select_isa(const std::string& name);

}  // namespace mistral::cpu

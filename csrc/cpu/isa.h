// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace mistral::cpu {

enum class Isa { scalar, avx2, avx512, avx512_bf16, amx };

const char* name(Isa isa);

// The sets that this binary holds and this processor runs, slowest first.
std::vector<Isa> supported_isas();

// The set in use: the set that the environment variable MISTRAL_EXT_ISA names, else the fastest
// supported set other than amx, which must be asked for. Throws std::invalid_argument, as every op
// does, if the variable names an unsupported set.
Isa active_isa();

// Throws std::invalid_argument for a name that is unknown or that this processor cannot run.
void select_isa(const std::string& name);

}  // namespace mistral::cpu

// Runs AVX-VNNI's instructions on a processor that has AVX2 and does not know them.
#pragma once

#include "../vex.h"

namespace mistral::emulated {

// For vex::Trap.
bool execute(const vex::Instruction& i, ucontext_t& context);

// The instructions that were emulated so far.
int64_t executed();

}  // namespace mistral::emulated

// Runs AMX's instructions on a processor that does not know them.
#pragma once

#include "../vex.h"

namespace mistral::cpu::emulated {

// For vex::Trap.
bool execute(const vex::Instruction& i, ucontext_t& context);

}  // namespace mistral::cpu::emulated

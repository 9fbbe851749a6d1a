// Tells which instruction sets this processor runs.
#pragma once

#include "isa.h"

namespace mistral::cpu {

// Whether the processor runs a set, and the operating system lets this process use it. False for
// the sets of other processors.
bool processor_has(Isa isa);

}  // namespace mistral::cpu

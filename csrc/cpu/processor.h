// The facts about this processor that kernels depend on.
#pragma once

#include "isa.h"

namespace mistral::cpu {

// Whether the processor runs a set, and the operating system lets this process use it. False for
// the sets of other processors.
bool processor_has(Isa isa);

// Whether weights, which are used once, are prefetched into the L2 cache, not into L1 alone. A core
// of Intel's can wait for few lines of its L1 at a time, but for many of its L2: it reads weights
// twice as fast through L2. A core of AMD's is as fast through L1, and then weights do not replace
// what L2 holds.
extern const bool kFetchesIntoL2;

}  // namespace mistral::cpu

// The facts about this processor that kernels depend on.
#pragma once

#include "isa.h"

namespace mistral::cpu {

// Whether the processor runs a set and the operating system lets this process use it. False for the
// sets of another architecture.
bool processor_has(Isa isa);

// Whether weights are prefetched into the L2 cache rather than into L1 alone. Weights are used only
// once. A core of Intel's can wait for few lines of its L1 at a time, but for many of its L2: it
// reads weights twice as fast through L2. A core of AMD's is as fast through L1, and then weights
// do not push other data out of L2.
extern const bool kFetchesIntoL2;

}  // namespace mistral::cpu

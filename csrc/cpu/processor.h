// What kernels need to know of this processor.
#pragma once

#include "isa.h"

namespace mistral::cpu {

// Whether the processor runs a set, and the operating system lets this process use it. False for
// the sets of other processors.
bool processor_has(Isa isa);

// Whether weights, which are used once, are prefetched into the L2 cache, not into L1 alone.
// Intel's processors wait for few lines of L1 at a time and for many of L2: there a core reads
// twice as fast. On AMD's, L1 is as fast, and weights do not replace what L2 holds.
extern const bool kFetchesIntoL2;

}  // namespace mistral::cpu

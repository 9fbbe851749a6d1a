// The facts about this processor that kernels depend on.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mistral::cpu {

// Whether the processor runs an instruction set and the operating system lets this process use it.
// False for the sets of another architecture.
bool processor_has(Isa isa);

// Whether weights are prefetched into the L2 cache (true) or into L1 alone (false). It is true on
// Intel processors. An Intel core can wait for few lines of its L1 at a time, but for many lines of
// its L2, so it reads weights twice as fast through L2. An AMD core is as fast through L1 alone.
// There weights, which a pass uses only once, push no other data out of L2.
extern const bool kFetchesIntoL2;

// The bytes of a core's L1 data cache.
extern const int64_t kL1Bytes;

}  // namespace mistral::cpu

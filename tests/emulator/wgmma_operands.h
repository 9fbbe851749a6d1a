// The arithmetic of wgmma, and its operands in shared memory: descriptors, layouts, the swizzle.
#pragma once

#include <cstdint>
#include <vector>

#include "error.h"
#include "wgmma.h"

namespace emulator {

// The offsets of the 16 bytes each that the running thread's warp reads in shared memory.
std::vector<uint32_t> chunks_of(Site site, const Wgmma& w);

// The warp's 16 rows of d. `a_registers` are those of its lanes, if a is not in shared memory.
void multiply(Site site, const Wgmma& w, const uint32_t (&a_registers)[32][4], float (&d)[16][128]);

}  // namespace emulator

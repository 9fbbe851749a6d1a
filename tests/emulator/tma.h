// The copy engine: boxes of tensors to shared memory, with the 128-byte swizzle.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "error.h"

namespace emulator {

// Copies the box at these coordinates, as many as the map has axes.
void tma_load(Site site, void* shared, const CUtensorMap* map, uint64_t* barrier,
              const int32_t* coordinates, int rank);

void tma_prefetch(Site site, const CUtensorMap* map);

}  // namespace emulator

// The instructions behind the emulator's ptx.cuh, with the semantics of the PTX ISA.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "counters.h"
#include "error.h"

namespace emulator {

// Check an access of the running thread and count it.
void access_global(Site site, Access access, const void* address, size_t bytes);

// The accesses of 16 bytes (uint4) and 8 (uint2) to shared memory. They are done here, not in the
// kernels' code, where they would be seen once more as plain ones (plain_accesses.cpp).
template <class T>
T load_shared(Site site, const void* address);
void store_shared(Site site, void* address, uint4 value);

uint32_t shared_offset(const void* address);

// Where the 128-byte swizzle of TMA and wgmma puts the byte at this offset in shared memory.
inline uint32_t swizzle_128(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Writes `size` bytes, of which the first `read` are copied and the others become zeros.
void cp_async(Site site, void* shared, const void* global, size_t size, size_t read);
void cp_async_commit();
void cp_async_wait(size_t pending_groups);

void ldmatrix_x4(Site site, uint32_t (&r)[4], const void* shared_row, bool transposed);

enum class Half { bf16, f16 };
void mma_m16n8k16(Site site, Half type, float (&d)[4], const uint32_t (&a)[4],
                  const uint32_t (&b)[2]);

// Waits for the earlier kernels. In a launch that overlaps with them, a thread may before this only
// read global memory that no kernel writes (Allocations::add).
void wait_for_earlier_kernels(Site site);
void let_later_kernels_begin(Site site);

float exp2_approx(float x);

}  // namespace emulator

// The memory traffic of a launch, counted as the hardware's profiler counts it.
#pragma once

#include <cstdint>
#include <vector>

#include "error.h"

namespace emulator {

struct Counters {
  uint64_t loaded_bytes = 0;  // from global memory, by plain loads, cp.async and TMA
  uint64_t stored_bytes = 0;
  uint64_t load_requests = 0;  // one per instruction and warp
  uint64_t store_requests = 0;
  uint64_t load_sectors = 0;  // different 32-byte sectors, per request
  uint64_t store_sectors = 0;
  uint64_t shared_requests = 0;   // 16-byte accesses, cp.async, ldmatrix
  uint64_t shared_conflicts = 0;  // passes over the banks beyond those without conflicts
  uint64_t mma = 0;               // warp-wide instructions
  uint64_t wgmma_flops = 0;       // 2 for each product of two elements
  uint64_t tma_bytes = 0;         // written to shared memory, zeros for what is outside too

  void add(const Counters& other);
};

enum class Access { global_load, global_store, shared };

// Lanes run one after another, so the accesses of one instruction arrive at different times. They
// are grouped by source line, in the order of each lane.
class Requests {
 public:
  void add(int lane, Site site, Access access, const void* address, uint32_t bytes);

  // Counts all that has been added. To be called when the lanes of the warp are together.
  void count_into(Counters& counters);

 private:
  struct Request {
    Site site;
    Access access;
    uint32_t bytes;  // per lane
    uint32_t lanes;
    uintptr_t address[32];
  };
  std::vector<Request> requests_;
  size_t next_[32] = {};  // of each lane: earlier requests are complete
};

// Bank conflicts: the passes over the 32 banks of 4 bytes that the accesses of the lanes need,
// beyond one pass for each 128 bytes. An access has 16 or 8 bytes.
uint64_t bank_conflicts(const uintptr_t (&addresses)[32], uint32_t lanes, uint32_t bytes);

}  // namespace emulator

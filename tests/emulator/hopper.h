// The state of a block that only compute capability 9.0 has, and the instructions behind the
// emulator's ptx_sm90.cuh that are not in a file of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "error.h"
#include "in_flight.h"
#include "mbarrier.h"
#include "named_barrier.h"
#include "shared_chunks.h"
#include "warpgroup.h"

namespace emulator {

constexpr int kHopper = 90;            // compute capability
constexpr size_t kMostMbarriers = 64;  // of a block, here

struct Hopper {
  Hopper(size_t shared_bytes, size_t threads)
      : chunks(shared_bytes), registers((threads + 31) / 32, threads), warpgroups(threads / 128) {}

  // Empty, or a description of what the block has left undone at its end.
  std::string problem_at_the_end() const;

  SharedChunks chunks;
  Mbarriers mbarriers;
  NamedBarriers named_barriers;
  RegisterPool registers;
  InFlight in_flight;
  std::vector<Warpgroup> warpgroups;
};

// The state of the running thread's block. Throws if the device does not have compute capability
// 9.0.
Hopper& hopper(Site site);

// The running thread's warp comes to an instruction of its warpgroup.
void warpgroup_step(Site site, const char* instruction, uint64_t operand = 0, uint64_t other = 0);

void mbarrier_init(Site site, uint64_t* barrier, uint32_t arrivals);
void mbarrier_init_fence(Site site);
void mbarrier_arrive(Site site, uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(Site site, uint64_t* barrier, uint32_t parity);
void cp_async_arrive(Site site, uint64_t* barrier);

void fence_proxy_async(Site site);

void registers_increase(Site site, int registers);
void registers_decrease(Site site, int registers);

void named_barrier_sync(Site site, int id, int threads);
void named_barrier_arrive(Site site, int id, int threads);

}  // namespace emulator

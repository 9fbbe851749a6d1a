#include "named_barrier.h"

#include <string>
#include <utility>

#include "block.h"

namespace emulator {

uint64_t NamedBarriers::arrive(Site site, int id, int threads) {
  const std::string name = "named barrier " + std::to_string(id);
  const dim3 size = current->block->launch().block;
  if (id < 1 || id > 15) fail(site, name + ", expected 1 to 15: 0 is that of __syncthreads");
  if (threads <= 0 || threads % 32 != 0 || unsigned(threads) > size.x * size.y * size.z) {
    fail(site, name + " for " + std::to_string(threads) +
                   " threads, expected a multiple of 32 and no more than the block has");
  }
  NamedBarrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.site = site;
  }
  if (threads != barrier.expected) {
    fail(site, name + " for " + std::to_string(threads) + " threads, but at " +
                   to_text(barrier.site) + " for " + std::to_string(barrier.expected));
  }
  Ordering& ordering = current->block->ordering();
  const Warp& warp = *current->warp;
  ordering.release(current->block->first_thread(warp), warp.lanes(), barrier.arriving);
  const uint64_t round = barrier.round;
  barrier.arrived += 32;
  if (barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.round;
    barrier.complete.join(std::exchange(barrier.arriving, {}), ordering.agents());
    for (const Thread* thread : std::exchange(barrier.waiting, {})) {
      thread->warp->wake(1u << thread->lane);
    }
  }
  return round;
}

void NamedBarriers::wait(Site site, int id, uint64_t round) {
  NamedBarrier& barrier = barriers_[id];
  if (barrier.round == round) {
    barrier.waiting.push_back(current);
    current->block->suspend("named barrier", site);
  }
  current->block->ordering().acquire(current->number, barrier.complete);
}

}  // namespace emulator

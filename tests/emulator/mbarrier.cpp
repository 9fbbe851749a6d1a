#include "mbarrier.h"

#include <cstdlib>
#include <string>
#include <utility>

#include "block.h"

namespace emulator {
namespace {

constexpr uint32_t kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;

// What a barrier holds in memory, so that it shows if something is written over it.
constexpr uint64_t kContent = 0x6d62617272696572;

}  // namespace

void Mbarriers::init(Site site, uint64_t* barrier, uint32_t arrivals) {
  check_shared(site, "mbarrier", barrier, sizeof *barrier);
  if (arrivals == 0 || arrivals > kMostArrivals) {
    fail(site, "mbarrier of " + std::to_string(arrivals) + " arrivals");
  }
  if (*barrier == kContent && barriers_.count(barrier)) {
    fail(site, "mbarrier is initialised a second time");
  }
  if (barriers_.size() >= kMostMbarriers) fail(site, "more mbarriers than are expected here");
  Block& block = *current->block;
  block.store_shared(site, barrier, sizeof *barrier);
  *barrier = kContent;
  const Agent copies = block.copies(barriers_.size());
  barriers_[barrier] = {arrivals, arrivals, 0, 0, current, false, {}, 0, copies, {}, {}};
}

void Mbarriers::fence_inits() {
  for (auto& [address, barrier] : barriers_) {
    if (barrier.maker == current) barrier.fenced = true;
  }
}

Mbarriers::Mbarrier& Mbarriers::find(Site site, uint64_t* barrier) {
  check_shared(site, "mbarrier", barrier, sizeof *barrier);
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) fail(site, "mbarrier is not initialised");
  if (*barrier != kContent) fail(site, "mbarrier has been overwritten");
  current->block->check_load_shared(site, barrier, sizeof *barrier);
  return found->second;
}

bool Mbarriers::arrive(Site site, uint64_t* address, uint32_t expected_bytes, const Clock& done) {
  Mbarrier& barrier = find(site, address);
  if (barrier.pending == 0) {
    fail(site, "mbarrier of " + std::to_string(barrier.arrivals) +
                   " arrivals: one more before the bytes of its phase have come");
  }
  barrier.bytes += expected_bytes;
  if (std::abs(barrier.bytes) > kMostBytes) {
    fail(site, "mbarrier expects " + std::to_string(barrier.bytes) + " bytes, too many");
  }
  --barrier.pending;
  barrier.arriving.join(done, current->block->ordering().agents());
  return complete_phase_if_done(site, barrier);
}

void Mbarriers::check_for_tma(Site site, uint64_t* address) {
  if (!find(site, address).fenced) {
    fail(site, "TMA is to report to an mbarrier without an mbarrier_init_fence since it was made");
  }
}

Agent Mbarriers::copies(Site site, uint64_t* address) { return find(site, address).copies; }

void Mbarriers::complete(Site site, uint64_t* address, uint32_t bytes) {
  Mbarrier& barrier = find(site, address);
  barrier.bytes -= bytes;
  current->block->ordering().release(barrier.copies, barrier.arriving);
  complete_phase_if_done(site, barrier);
}

bool Mbarriers::complete_phase_if_done(Site site, Mbarrier& barrier) {
  if (barrier.pending > 0) return false;
  if (barrier.bytes < 0) {
    fail(site, "mbarrier: " + std::to_string(-barrier.bytes) +
                   " bytes more have come than its phase expects");
  }
  if (barrier.bytes > 0) return false;
  if (barrier.resuming > 0) {
    fail(site, "mbarrier completes a phase, and " + std::to_string(barrier.resuming) +
                   " threads may not have seen that the one before was complete");
  }
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.complete = std::exchange(barrier.arriving, {});
  barrier.resuming = barrier.waiting.size();
  for (const Thread* thread : std::exchange(barrier.waiting, {})) {
    thread->warp->wake(1u << thread->lane);
  }
  return true;
}

void Mbarriers::wait(Site site, uint64_t* address, uint32_t parity) {
  Mbarrier& barrier = find(site, address);
  if (parity > 1) fail(site, "parity " + std::to_string(parity) + ", expected 0 or 1");
  if (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(current);
    current->block->suspend("mbarrier_wait", site);
    --barrier.resuming;
  }
  current->block->ordering().acquire(current->number, barrier.complete);
}

std::string Mbarriers::problem_at_the_end() const {
  for (const auto& [address, barrier] : barriers_) {
    if (barrier.bytes != 0) {
      return "an mbarrier is left with " + std::to_string(barrier.bytes) + " bytes to come";
    }
  }
  return {};
}

}  // namespace emulator

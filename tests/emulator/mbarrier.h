// The barriers that kernels keep in shared memory: arrivals, bytes and phases.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "ordering.h"

namespace emulator {

struct Thread;

class Mbarriers {
 public:
  // For the running thread.
  void init(Site site, uint64_t* barrier, uint32_t arrivals);
  void fence_inits();
  // `done`: what threads that wait for the phase may then rely on. True: this arrival is the last.
  bool arrive(Site site, uint64_t* barrier, uint32_t expected_bytes, const Clock& done);
  void wait(Site site, uint64_t* barrier, uint32_t parity);

  // For TMA: checks that it may report to the barrier, and counts what it has brought.
  void check_for_tma(Site site, uint64_t* barrier);
  void complete(Site site, uint64_t* barrier, uint32_t bytes);
  Agent copies(Site site, uint64_t* barrier);  // as which it accesses shared memory

  // Empty, or a description of what is wrong with the barriers at the end of the block.
  std::string problem_at_the_end() const;

 private:
  struct Mbarrier {
    uint32_t arrivals;  // of each phase
    uint32_t pending;   // of this one
    int64_t bytes;      // expected and not yet there; negative if they came first
    uint64_t phase;     // how many are complete
    const Thread* maker;
    bool fenced;                   // since it was made, by its maker
    std::vector<Thread*> waiting;  // for this phase
    size_t resuming;               // those that have waited and have not run since
    Agent copies;
    Clock arriving;  // what the threads that arrived in this phase have done
    Clock complete;  // in the one before
  };
  Mbarrier& find(Site site, uint64_t* barrier);
  bool complete_phase_if_done(Site site, Mbarrier& barrier);

  std::unordered_map<const uint64_t*, Mbarrier> barriers_;
};

}  // namespace emulator

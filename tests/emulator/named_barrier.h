// bar.sync and bar.arrive: the numbered barriers of a block.
#pragma once

#include <cstdint>
#include <vector>

#include "error.h"
#include "ordering.h"

namespace emulator {

struct Thread;

class NamedBarriers {
 public:
  // The warp of the running thread comes to the barrier. Returns the round that it waits for.
  uint64_t arrive(Site site, int id, int threads);

  // The running thread waits until the round is over.
  void wait(Site site, int id, uint64_t round);

 private:
  struct NamedBarrier {
    int expected = 0;  // threads, as the first to come in this round has said
    int arrived = 0;
    Site site = {};
    uint64_t round = 0;
    std::vector<Thread*> waiting = {};
    Clock arriving = {};  // what those have done that have come in this round
    Clock complete = {};  // in those before
  };
  NamedBarrier barriers_[16];
};

}  // namespace emulator

// Warpgroups: the check that their warps issue the same instructions, and their registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "error.h"

namespace emulator {

struct Thread;
class Warp;

// The hardware does not say that the warps of a warpgroup wait for each other at an instruction of
// the group, so here they do not; but they must come to the same ones in the same order.
class Warpgroup {
 public:
  struct Step {
    const char* instruction;
    Site site;
    uint64_t operands[2];
  };
  // Warp 0 to 3 of the group comes to an instruction.
  void step(size_t warp, const Step& step);

  bool together() const { return steps_.empty(); }

 private:
  size_t done_[4] = {};
  size_t trimmed_ = 0;      // steps that all have done
  std::deque<Step> steps_;  // the others
};

// The registers of a block that setmaxnreg moves from warp to warp.
class RegisterPool {
 public:
  RegisterPool(size_t warps, size_t threads);

  // For the running thread. `increase` waits until there are enough.
  void increase(Site site, int registers);
  void decrease(Site site, int registers);

 private:
  size_t warp() const;
  int free_ = 0;                // per lane of a warp
  std::vector<int> registers_;  // of each warp, per lane
  std::vector<Thread*> waiting_;
};

}  // namespace emulator

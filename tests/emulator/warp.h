// A warp: its lanes run as fibers, one after another and in any order, and meet where an
// instruction needs them all.
#pragma once

#include <cstdint>
#include <vector>

#include "counters.h"
#include "error.h"
#include "wgmma.h"

namespace emulator {

class Block;

// A warp-wide instruction. The last lane to arrive calls `combine` for all: operands[i] is what
// lane i brought, for the lanes in `mask`.
struct Collective {
  const char* name;
  void (*combine)(Site site, void* const* operands, uint32_t mask);
};

class Warp {
 public:
  // `lanes`: those that the warp has; the last warp of a block may lack some.
  Warp(Block& block, uint32_t lanes) : block_(block), lanes_(lanes), ready_(lanes) {}

  // The running lane waits here until all lanes in `mask` have come to the same instruction.
  void meet(const Collective& collective, Site site, uint32_t mask, void* operands);

  // The running lane has returned from the kernel.
  void exit(int lane);

  uint32_t ready() const { return ready_; }  // lanes that can run
  uint32_t lanes() const { return lanes_; }
  void suspend(int lane) { ready_ &= ~(1u << lane); }
  void wake(uint32_t lanes) { ready_ |= lanes; }
  Requests& requests() { return requests_; }
  WgmmaQueue& wgmma() { return wgmma_; }

 private:
  struct Meeting {
    const Collective* collective;
    Site site;
    uint32_t mask;
    uint32_t arrived;
    void* operands[32];
  };
  void check_arrival(const Collective& collective, Site site, uint32_t mask) const;
  Meeting& find_or_open(const Collective& collective, Site site, uint32_t mask);

  Block& block_;
  uint32_t lanes_;
  uint32_t ready_;
  uint32_t exited_ = 0;
  std::vector<Meeting> meetings_;  // more than one only with masks of some lanes
  Requests requests_;
  WgmmaQueue wgmma_;
};

}  // namespace emulator

#include "hopper.h"

#include <string>

#include "block.h"

namespace emulator {
namespace {

struct Registers {
  int count;
  bool increase;
};

void combine_registers(Site site, void* const* operands, uint32_t) {
  const auto& registers = *static_cast<const Registers*>(operands[0]);
  warpgroup_step(site, registers.increase ? "registers_increase" : "registers_decrease",
                 static_cast<uint64_t>(registers.count));
  if (!registers.increase) current->block->hopper().registers.decrease(site, registers.count);
}

struct NamedBarrierUse {
  int id, threads;
  uint64_t round;
};

void combine_named_barrier(Site site, void* const* operands, uint32_t) {
  const auto& first = *static_cast<const NamedBarrierUse*>(operands[0]);
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<const NamedBarrierUse*>(operands[lane]);
    if (other.id != first.id || other.threads != first.threads) {
      fail(site, "named barrier with operands that differ between the lanes of a warp");
    }
  }
  const uint64_t round =
      current->block->hopper().named_barriers.arrive(site, first.id, first.threads);
  for (int lane = 0; lane < 32; ++lane) {
    static_cast<NamedBarrierUse*>(operands[lane])->round = round;
  }
}

constexpr Collective kRegisters = {"setmaxnreg", &combine_registers};
constexpr Collective kNamedBarrier = {"named barrier", &combine_named_barrier};
constexpr uint32_t kAllLanes = 0xffffffff;

}  // namespace

std::string Hopper::problem_at_the_end() const {
  if (!in_flight.empty()) {
    return "nothing has waited for what was started at " + to_text(in_flight.first().site);
  }
  for (const Warpgroup& warpgroup : warpgroups) {
    if (!warpgroup.together()) {
      return "some warps of a warpgroup have done more wgmma or setmaxnreg than others";
    }
  }
  return mbarriers.problem_at_the_end();
}

Hopper& hopper(Site site) {
  if (current->block->launch().capability != kHopper) {
    fail(site, "an instruction of compute capability 9.0 on a device of another");
  }
  return current->block->hopper();
}

void warpgroup_step(Site site, const char* instruction, uint64_t operand, uint64_t other) {
  const size_t warp = current->block->number(*current->warp);
  auto& warpgroups = hopper(site).warpgroups;
  if (warp / 4 >= warpgroups.size()) {
    fail(site, std::string(instruction) + " by a warp that is in no whole warpgroup");
  }
  warpgroups[warp / 4].step(warp % 4, {instruction, site, {operand, other}});
}

void mbarrier_init(Site site, uint64_t* barrier, uint32_t arrivals) {
  hopper(site).mbarriers.init(site, barrier, arrivals);
}

void mbarrier_init_fence(Site site) { hopper(site).mbarriers.fence_inits(); }

void mbarrier_arrive(Site site, uint64_t* barrier, uint32_t expected_bytes) {
  Hopper& h = hopper(site);
  Clock done;
  current->block->ordering().release(current->number, done);
  if (h.mbarriers.arrive(site, barrier, expected_bytes, done)) current->block->yield();
}

void mbarrier_wait(Site site, uint64_t* barrier, uint32_t parity) {
  hopper(site).mbarriers.wait(site, barrier, parity);
}

void cp_async_arrive(Site site, uint64_t* barrier) {
  Hopper& h = hopper(site);
  const Time now = current->block->ordering().now(current->number);
  Clock done;
  current->block->ordering().release(current->number, done);
  const auto deliver = [site, barrier, &h, until = current->copies.started(), now, done] {
    current->copies.deliver_until(until, now);
    h.mbarriers.arrive(site, barrier, 0, done);
  };
  if (current->block->launch().delivery == Delivery::early) return deliver();
  h.in_flight.add({current, site, deliver});
}

void fence_proxy_async(Site site) {
  Hopper& h = hopper(site);
  current->proxy_fence = h.chunks.moment();
  h.mbarriers.fence_inits();
}

void registers_increase(Site site, int registers) {
  hopper(site).registers.increase(site, registers);
  Registers operands{registers, true};
  current->warp->meet(kRegisters, site, kAllLanes, &operands);
}

void registers_decrease(Site site, int registers) {
  hopper(site);
  Registers operands{registers, false};
  current->warp->meet(kRegisters, site, kAllLanes, &operands);
}

void named_barrier_sync(Site site, int id, int threads) {
  NamedBarrierUse operands{id, threads, 0};
  Hopper& h = hopper(site);
  current->warp->meet(kNamedBarrier, site, kAllLanes, &operands);
  h.named_barriers.wait(site, id, operands.round);
}

void named_barrier_arrive(Site site, int id, int threads) {
  NamedBarrierUse operands{id, threads, 0};
  hopper(site);
  current->warp->meet(kNamedBarrier, site, kAllLanes, &operands);
  current->block->yield();
}

}  // namespace emulator

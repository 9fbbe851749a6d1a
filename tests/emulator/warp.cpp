#include "warp.h"

#include <cstdio>
#include <string>

#include "block.h"

namespace emulator {
namespace {

std::string hex(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

}  // namespace

void Warp::check_arrival(const Collective& collective, Site site, uint32_t mask) const {
  const uint32_t self = 1u << current->lane;
  const auto refuse = [&](const std::string& problem) {
    fail(site, std::string(collective.name) + " with mask " + hex(mask) + problem);
  };
  if (!(mask & self)) {
    refuse(" by lane " + std::to_string(current->lane) + ", which is not in it");
  }
  if (mask & ~lanes_) {
    refuse(" names lanes that this warp does not have: it has " + hex(lanes_));
  }
  if (mask & exited_) {
    refuse(" names lanes that have left the kernel: " + hex(mask & exited_));
  }
  // Lanes that wait elsewhere for this one, and for which this one would wait here.
  for (const Meeting& m : meetings_) {
    const bool here = m.collective == &collective && m.site == site && m.mask == mask;
    if (!here && (m.mask & self) && (m.arrived & mask)) {
      refuse(" is divergent: lanes " + hex(m.arrived & mask) + " wait at " + to_text(m.site) +
             " for " + m.collective->name + " with mask " + hex(m.mask));
    }
  }
}

Warp::Meeting& Warp::find_or_open(const Collective& collective, Site site, uint32_t mask) {
  for (Meeting& m : meetings_) {
    if (m.collective == &collective && m.site == site && m.mask == mask) return m;
  }
  meetings_.push_back({&collective, site, mask, 0, {}});
  return meetings_.back();
}

void Warp::meet(const Collective& collective, Site site, uint32_t mask, void* operands) {
  check_arrival(collective, site, mask);
  Meeting& meeting = find_or_open(collective, site, mask);
  const uint32_t self = 1u << current->lane;
  meeting.operands[current->lane] = operands;
  meeting.arrived |= self;
  if (meeting.arrived != mask) return block_.suspend(collective.name, site);

  const Meeting complete = meeting;
  meeting = meetings_.back();
  meetings_.pop_back();
  if (mask == (lanes_ & ~exited_)) requests_.count_into(block_.counters());
  collective.combine(site, complete.operands, mask);
  wake(mask);
}

void Warp::exit(int lane) {
  const uint32_t self = 1u << lane;
  for (const Meeting& m : meetings_) {
    if (m.mask & self) {
      fail(m.site, "lane " + std::to_string(lane) + " left the kernel while lanes " +
                       hex(m.arrived) + " wait for it at " + m.collective->name);
    }
  }
  wgmma_.check_exit(lane);
  exited_ |= self;
  suspend(lane);
  if (exited_ == lanes_) requests_.count_into(block_.counters());
}

}  // namespace emulator

#include "copies.h"

#include <cstring>
#include <utility>

#include "block.h"

namespace emulator {
namespace {

constexpr size_t kBytes = 16;

}  // namespace

void Copies::start(Site site, void* shared, const void* global, bool valid) {
  check_shared(site, "cp.async to shared memory", shared, kBytes);
  Requests& requests = current->warp->requests();
  requests.add(current->lane, site, Access::shared, shared, kBytes);
  if (valid) {
    check_global(site, "cp.async from global memory", global, kBytes);
    current->block->note_load(site, global, kBytes);
    requests.add(current->lane, site, Access::global_load, global, kBytes);
  }
  const Copy copy{shared, valid ? global : nullptr};
  if (delivery_ == Delivery::early) return deliver(copy);
  memset(shared, 0xff, kBytes);
  uncommitted_.push_back(copy);
}

void Copies::commit() { groups_.push_back(std::exchange(uncommitted_, {})); }

void Copies::wait(size_t pending_groups) {
  while (groups_.size() > pending_groups) {
    for (const Copy& copy : groups_.front()) deliver(copy);
    groups_.pop_front();
  }
}

void Copies::deliver(const Copy& copy) {
  if (copy.global) {
    memcpy(copy.shared, copy.global, kBytes);
  } else {
    memset(copy.shared, 0, kBytes);
  }
}

}  // namespace emulator

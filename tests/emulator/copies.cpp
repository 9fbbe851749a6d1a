#include "copies.h"

#include <cstring>

#include "block.h"

namespace emulator {

void Copies::start(Site site, void* shared, const void* global, size_t size, size_t read) {
  check_shared(site, "cp.async to shared memory", shared, size);
  check_alignment(site, "cp.async from global memory", global, size);
  Requests& requests = current->warp->requests();
  if (size == 16) requests.add(current->lane, site, Access::shared, shared, 16);
  if (read > 0) {
    check_global(site, "cp.async from global memory", Use::load, global, read);
    current->block->note_load(site, global, read);
    requests.add(current->lane, site, Access::global_load, global, static_cast<uint32_t>(read));
  }
  current->block->begin_copy(site, shared, size);
  waiting_.push_back({site, shared, global, size, read});
  if (delivery_ == Delivery::early) {
    move(waiting_.back());
  } else {
    memset(shared, 0xff, size);
  }
}

void Copies::commit() { groups_.push_back(started()); }

void Copies::wait(size_t pending_groups) {
  const Time now = current->block->ordering().now(current->number);
  while (groups_.size() > pending_groups) {
    deliver_until(groups_.front(), now);
    groups_.pop_front();
  }
}

void Copies::deliver_until(uint64_t count, Time until) {
  for (; delivered_ < count; ++delivered_) {
    const Copy& copy = waiting_.front();
    if (delivery_ == Delivery::late) move(copy);
    current->block->finish_copy(copy.site, copy.shared, copy.size, until);
    waiting_.pop_front();
  }
}

void Copies::move(const Copy& copy) {
  if (copy.read > 0) memcpy(copy.shared, copy.global, copy.read);
  memset(static_cast<char*>(copy.shared) + copy.read, 0, copy.size - copy.read);
}

}  // namespace emulator

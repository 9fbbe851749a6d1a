#include "copies.h"

#include <cstring>

#include "block.h"

namespace emulator {

void Copies::start(Site site, void* shared, const void* global, size_t size, size_t read) {
  check_shared(site, "cp.async to shared memory", shared, size);
  Requests& requests = current->warp->requests();
  if (size == 16) requests.add(current->lane, site, Access::shared, shared, 16);
  if (read > 0) {
    check_global(site, "cp.async from global memory", global, read);
    current->block->note_load(site, global, read);
    requests.add(current->lane, site, Access::global_load, global, static_cast<uint32_t>(read));
  }
  const Copy copy{site, shared, global, size, read};
  if (delivery_ == Delivery::early) return deliver(copy);
  current->block->note_shared_store(site, shared);
  memset(shared, 0xff, size);
  waiting_.push_back(copy);
}

void Copies::commit() { groups_.push_back(started()); }

void Copies::wait(size_t pending_groups) {
  while (groups_.size() > pending_groups) {
    deliver_until(groups_.front());
    groups_.pop_front();
  }
}

void Copies::deliver_until(uint64_t count) {
  for (; delivered_ < count; ++delivered_) {
    deliver(waiting_.front());
    waiting_.pop_front();
  }
}

void Copies::deliver(const Copy& copy) {
  current->block->note_shared_store(copy.site, copy.shared);
  if (copy.read > 0) memcpy(copy.shared, copy.global, copy.read);
  memset(static_cast<char*>(copy.shared) + copy.read, 0, copy.size - copy.read);
}

}  // namespace emulator

#include "visibility.h"

#include <algorithm>

namespace emulator {

void join(Knowledge& knowledge, const Knowledge& other) {
  for (const auto& [block, times] : other) {
    auto& known = knowledge[block];
    if (known == times) continue;
    if (!known) {
      known = times;
      continue;
    }
    std::vector<Time> both = *known;
    for (size_t i = 0; i < both.size(); ++i) both[i] = std::max(both[i], (*times)[i]);
    known = std::make_shared<const std::vector<Time>>(std::move(both));
  }
}

Bytes GlobalStores::bytes(const void* address, size_t count) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  return {begin / 16 * 16, ((1u << count) - 1) << begin % 16};
}

void GlobalStores::add(Bytes bytes, const Store& store) {
  Shard& part = shard(bytes.line);
  const std::lock_guard lock(part.mutex);
  std::vector<Store>& stores = part.lines[bytes.line];
  for (Store& other : stores) {
    if (other.block == store.block && other.thread == store.thread && other.time == store.time) {
      other.mask |= bytes.mask;
      return;
    }
    other.mask &= ~bytes.mask;
  }
  stores.push_back(store);
}

std::optional<GlobalStores::Store> GlobalStores::find_between(uintptr_t begin,
                                                              uintptr_t end) const {
  for (const Shard& part : shards_) {
    for (const auto& [line, stores] : part.lines) {
      if (line + 16 <= begin || line >= end) continue;
      const uint32_t from = begin > line ? 0xffffu << (begin - line) : 0xffffu;
      const uint32_t to = end < line + 16 ? (1u << (end - line)) - 1 : 0xffffu;
      for (const Store& store : stores) {
        if (store.mask & from & to) return store;
      }
    }
  }
  return {};
}

}  // namespace emulator

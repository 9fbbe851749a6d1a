#include "visibility.h"

#include <algorithm>

namespace emulator {

Bytes Unfenced::bytes(const void* address, size_t count) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  return {begin / 16 * 16, ((1u << count) - 1) << begin % 16};
}

void Unfenced::store(uint64_t block, Bytes bytes) {
  Shard& part = shard(bytes.line);
  const std::lock_guard lock(part.mutex);
  std::vector<Store>& stores = part.lines[bytes.line];
  for (Store& store : stores) {
    if (store.block == block) {
      store.mask |= bytes.mask;
      return;
    }
  }
  stores.push_back({block, bytes.mask});
}

void Unfenced::fence(uint64_t block, const std::vector<Bytes>& stored) {
  for (const Bytes& bytes : stored) {
    Shard& part = shard(bytes.line);
    const std::lock_guard lock(part.mutex);
    const auto line = part.lines.find(bytes.line);
    if (line == part.lines.end()) continue;
    std::vector<Store>& stores = line->second;
    for (Store& store : stores) {
      if (store.block == block) store.mask &= ~bytes.mask;
    }
    stores.erase(std::remove_if(stores.begin(), stores.end(),
                                [](const Store& store) { return store.mask == 0; }),
                 stores.end());
    if (stores.empty()) part.lines.erase(line);
  }
}

bool Unfenced::by_another(uint64_t block, Bytes bytes) {
  Shard& part = shard(bytes.line);
  const std::lock_guard lock(part.mutex);
  const auto line = part.lines.find(bytes.line);
  return line != part.lines.end() &&
         std::any_of(line->second.begin(), line->second.end(), [&](const Store& store) {
           return store.block != block && (store.mask & bytes.mask);
         });
}

}  // namespace emulator

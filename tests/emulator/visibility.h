// Which blocks may rely on a store to global memory. All blocks see a store at once here;
// on a GPU another block may see it late or never. It may rely on a store if the storing thread, or
// one that met it at a barrier since, has called __threadfence and then an atomic function of a
// word, and the loading thread, or one that it met at a barrier since, an atomic function of this
// word and then __threadfence.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "error.h"
#include "ordering.h"

namespace emulator {

// Bytes of an aligned line of 16, bit i for byte i.
struct Bytes {
  uintptr_t line;
  uint32_t mask;
};

// Of each block, the times of its threads up to which their stores are known.
using Knowledge = std::map<uint64_t, std::shared_ptr<const std::vector<Time>>>;
void join(Knowledge& knowledge, const Knowledge& other);

// The stores of a launch, of all blocks. Used by several threads.
class GlobalStores {
 public:
  struct Store {
    uint64_t block;
    Agent thread;
    Time time;
    uint32_t mask;
    Site site;
  };

  // Accesses do not cross a line.
  static Bytes bytes(const void* address, size_t count);

  void add(Bytes bytes, const Store& store);

  // A store of some of these bytes that is not `known`, or nothing.
  template <class Known>
  std::optional<Store> find_unknown(Bytes bytes, const Known& known) {
    Shard& part = shard(bytes.line);
    const std::lock_guard lock(part.mutex);
    const auto line = part.lines.find(bytes.line);
    if (line == part.lines.end()) return {};
    for (const Store& store : line->second) {
      if ((store.mask & bytes.mask) && !known(store)) return store;
    }
    return {};
  }

  // A store to memory from begin to end, or nothing.
  std::optional<Store> find_between(uintptr_t begin, uintptr_t end) const;

 private:
  struct Shard {  // part of the lines, so that threads seldom wait for each other
    std::mutex mutex;
    std::unordered_map<uintptr_t, std::vector<Store>> lines;
  };
  static constexpr size_t kShards = 64;
  Shard& shard(uintptr_t line) { return shards_[line / 16 % kShards]; }

  Shard shards_[kShards];
};

// The words that atomic functions have been called for, and what can be learnt there.
struct AtomicWords {
  std::mutex mutex;  // held while the function does its work
  std::unordered_map<uintptr_t, Knowledge> words;
};

}  // namespace emulator

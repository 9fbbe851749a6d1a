// Which blocks may count on what has been stored to global memory. Blocks run one after another
// here, so every store is seen by all; on a GPU another block may see it late or never, unless the
// storing thread, or one that met it at a barrier since, has called __threadfence.
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulator {

// Bytes of an aligned line of 16, bit i for byte i.
struct Bytes {
  uintptr_t line;
  uint32_t mask;
};

// The stores of a launch that no fence has followed, of all blocks. Used by several threads.
class Unfenced {
 public:
  // Accesses do not cross a line.
  static Bytes bytes(const void* address, size_t count);

  void store(uint64_t block, Bytes bytes);
  void fence(uint64_t block, const std::vector<Bytes>& stored);

  // True if another block than `block` has stored some of them.
  bool by_another(uint64_t block, Bytes bytes);

 private:
  struct Store {
    uint64_t block;
    uint32_t mask;
  };
  struct Shard {  // part of the lines, so that threads seldom wait for each other
    std::mutex mutex;
    std::unordered_map<uintptr_t, std::vector<Store>> lines;
  };
  static constexpr size_t kShards = 64;
  Shard& shard(uintptr_t line) { return shards_[line / 16 % kShards]; }

  Shard shards_[kShards];
};

}  // namespace emulator

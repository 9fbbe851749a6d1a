// Finds races in a block's shared memory: two accesses of the same bytes, one of them a store, that
// no barrier orders (ordering.h). A race is an error even if the order of this run happens to be
// harmless.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "error.h"
#include "ordering.h"

namespace emulator {

class SharedAccesses {
 public:
  // The agent of an access, and what it may rely on: a thread, or all lanes of a warp together.
  struct Observer {
    const Ordering& ordering;
    Agent agent;          // that makes the access
    Agent thread;         // whose knowledge counts, unless it is
    const Clock* common;  // that of all lanes
    const Clock& clock() const { return common ? *common : ordering.clock(thread); }
    bool knows(Agent other, Time time) const {
      return common ? time != kUnfinished && common->at(other) >= time
                    : ordering.knows(thread, other, time);
    }
  };

  explicit SharedAccesses(size_t bytes) : chunks_((bytes + 15) / 16) {}

  // For the next block, with so many agents.
  void begin_block(size_t agents);

  // By offsets in bytes, of bytes that may be in several chunks. `time`: kUnfinished if the access
  // is only begun.
  void load(Site site, const Observer& by, size_t offset, size_t bytes, Time time);
  void store(Site site, const Observer& by, size_t offset, size_t bytes, Time time);
  void check_load(Site site, const Observer& by, size_t offset, size_t bytes);

  void note_load(Site site, const Observer& by, size_t offset, size_t bytes, Time time);

  // A store that was begun is done: of up to 16 bytes in a chunk.
  void finish_store(size_t offset, size_t bytes, Agent agent, Time time);

 private:
  struct Access {
    Agent agent;
    Time time;
    uint32_t bytes;  // bit i: byte i of the chunk
    Site site;
  };
  static constexpr size_t kFew = 16;  // of many loads, one of each agent is kept for each word
  struct Chunk {
    uint32_t block = 0;  // whose accesses these are
    std::vector<Access> stores, loads;
    std::unique_ptr<std::vector<Time>> all_loads;  // [4, agents], if there were many
  };
  template <class F>
  void for_each_chunk(size_t offset, size_t bytes, F f);
  void check_stores(Site site, const Observer& by, const Chunk& chunk, size_t i, uint32_t bytes,
                    const char* what) const;
  void check_loads(Site site, const Observer& by, const Chunk& chunk, size_t i,
                   uint32_t bytes) const;
  void load_chunk(const Observer& by, Chunk& chunk, const Access& access);
  void store_chunk(Chunk& chunk, const Access& access);

  std::vector<Chunk> chunks_;
  uint32_t block_ = 0;
  size_t agents_ = 0;
};

}  // namespace emulator

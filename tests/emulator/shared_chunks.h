// The users of each 16 bytes of shared memory that wgmma or TMA access. Both are asynchronous, and
// they see what threads have stored only after a fence_proxy_async.
//
// A store of a thread is seen once this thread has called the fence, or those that start the wgmma
// or TMA have. The fence does not order the store before them; barriers do, and ordering.h checks
// those.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "error.h"

namespace emulator {

struct Thread;

class SharedChunks {
 public:
  explicit SharedChunks(size_t bytes) : chunks_((bytes + 15) / 16) {}

  // By offsets in bytes. The running thread stores, or its cp.async does.
  void store(Site site, size_t offset, size_t bytes);

  // wgmma reads from its start to the wait. `fence`: the latest moment before which all threads
  // that start it have called fence_proxy_async.
  void begin_wgmma(Site site, uint32_t offset, uint64_t fence);
  void end_wgmma(uint32_t offset) { --at(offset).readers; }

  // TMA writes from its start, by the running thread, to its delivery.
  void begin_tma(Site site, uint32_t offset);
  void end_tma(uint32_t offset) { at(offset).filling = false; }

  // The current moment. Each call is a new moment.
  uint64_t moment() { return ++moment_; }

 private:
  struct Chunk {
    const Thread* writer = nullptr;  // whose store no wgmma or TMA has seen yet
    uint64_t written = 0;            // when
    uint32_t readers = 0;
    bool filling = false;
  };
  Chunk& at(size_t offset) { return chunks_[offset / 16]; }
  void check_fenced(Site site, const char* what, uint32_t offset, uint64_t fence);

  std::vector<Chunk> chunks_;
  uint64_t moment_ = 0;
};

}  // namespace emulator

// A stream on which launches overlap (programmatic dependent launch), in the order that is hardest
// on them: a launch begins as soon as all blocks of the launch before it have let it or have ended,
// and runs up to where it waits for that launch before any of those blocks goes on.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <thread>
#include <vector>

#include "block.h"

namespace emulator {

// All its methods are called by one thread of the process: fibers stay on the thread that began
// them. When one throws Error, the launches of the stream have been given up.
class Stream {
 public:
  void add(std::unique_ptr<Launch> launch);

  // Throws unless the calling thread is that of the stream.
  void check_thread() const;

  // Calls `action` when the latest launch has ended, at once if there is none.
  void when_done(std::function<void()> action);

  // Runs all launches to their end.
  void finish();

 private:
  // A block with memory of its own: those of a launch exist at the same time.
  struct Resident {
    Resident(Launch& launch, uint3 index)
        : shared(launch.shared_bytes),
          accesses(launch.shared_bytes),
          block(launch, index, shared, accesses, stacks()) {}
    SharedMemory shared;
    SharedAccesses accesses;
    Block block;
  };
  struct Running {
    std::unique_ptr<Launch> launch;
    std::list<Resident> blocks;
    std::vector<std::function<void()>> actions;

    void run();
    bool lets_later_kernels_begin() const;
  };
  void start(std::unique_ptr<Launch> launch);
  void finish_first();

  std::thread::id thread_ =  // that began it
      std::this_thread::get_id();
  std::list<Running> running_;  // a launch waits for the one before it
};

}  // namespace emulator

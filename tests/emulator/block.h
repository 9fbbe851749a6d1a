// One block: its threads as fibers, a scheduler that runs them in a seeded random order, and the
// barrier.
#pragma once

#include <vector_types.h>

#include <boost/context/fiber.hpp>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "copies.h"
#include "counters.h"
#include "hopper.h"
#include "memory.h"
#include "ordering.h"
#include "shared_accesses.h"
#include "stacks.h"
#include "visibility.h"
#include "warp.h"

namespace emulator {

// A launch: the data that its blocks share.
struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> body;  // the kernel with its arguments
  Delivery delivery;
  uint64_t seed;
  int capability;           // of the device
  bool overlaps;            // with earlier launches, until its threads wait for them
  Allocations allocations;  // what its threads may access
  GlobalStores stores = {};
  AtomicWords atomics = {};
  // Of launches on a Stream:
  bool waits = false;  // there is an earlier launch that has not ended
  bool holds = false;  // a block stops where it lets later kernels begin
};

// A CUDA thread.
struct Thread {
  Block* block;
  Warp* warp;
  Agent number;  // in the block
  int lane;
  uint3 index;
  Copies copies;
  boost::context::stack_context stack = {};
  boost::context::fiber fiber = {};
  void* sanitizer_state = nullptr;
  Knowledge fenced = {};             // what it had done and learnt until its last __threadfence
  Knowledge seen = {};               // what it has learnt at atomic words since then
  uint64_t proxy_fence = 0;          // when it last called fence_proxy_async: SharedChunks
  const char* waiting_at = nullptr;  // the instruction that it waits or last waited at
  Site site = {};
  Site latest = {};  // of the latest call; null at its start
  bool exited = false;
  bool waited = false;  // for earlier kernels
};

// The CUDA thread that this thread of the process is running. (__thread, because a thread_local
// that another file defines costs a call at each use.)
extern __thread Thread* current;

std::string to_text(uint3 index);

class Block {
 public:
  Block(Launch& launch, uint3 index, SharedMemory& shared, SharedAccesses& accesses,
        Stacks& stacks);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { abandon(); }

  // Runs all threads to their end. Or, while the launch `waits` or `holds`, to where they wait for
  // earlier kernels or let later ones begin; the same thread of the process then calls it again.
  // Throws the first error; the other threads then stop.
  void run();
  bool ended() const { return exited_ == threads_.size(); }
  bool lets_later_kernels_begin() const { return lets_later_ || ended(); }

  // For the running thread: __syncthreads, and waiting for whatever wakes its lane.
  void barrier(Site site);
  void suspend(const char* instruction, Site site);
  void wait_for_earlier_kernels(Site site);
  void let_later_kernels_begin(Site site);

  // For the running thread, which has just allowed other threads to run: they may now overtake it.
  void yield();

  // For the running thread, which accesses shared memory itself or by cp.async.
  void load_shared(Site site, const void* address, size_t bytes);
  // For its warp: lane i loads 16 bytes at addresses[i], for all lanes.
  void load_shared_together(Site site, const uintptr_t (&addresses)[32]);
  void check_load_shared(Site site, const void* address, size_t bytes);
  void store_shared(Site site, const void* address, size_t bytes);
  void begin_copy(Site site, const void* address, size_t bytes);
  void finish_copy(Site site, const void* address, size_t bytes, Time time);
  // The same for an access that the compiler has reported, without a Site and without a check of
  // bounds. It cannot throw, so an error ends the block later.
  void note_plain_access(const void* address, size_t bytes, bool store) noexcept;

  // For the running thread: records its accesses of global memory, for the checks of visibility.
  void note_load(Site site, const void* address, size_t bytes);
  void note_store(Site site, const void* address, size_t bytes);
  void note_atomic(const void* address);  // with the lock of launch().atomics
  void fence();

  Launch& launch() const { return launch_; }
  uint3 index() const { return index_; }
  SharedMemory& shared() { return shared_; }
  Counters& counters() { return counters_; }
  Hopper& hopper() { return *hopper_; }  // where the device is one
  Ordering& ordering() { return *ordering_; }
  SharedAccesses& accesses() { return accesses_; }
  size_t number(const Warp& warp) const { return static_cast<size_t>(&warp - warps_.data()); }
  Agent first_thread(const Warp& warp) const { return static_cast<Agent>(32 * number(warp)); }
  // Agents that are no threads: the copies that report to barrier i, and the products of a warp.
  Agent copies(size_t i) const { return static_cast<Agent>(threads_.size() + i); }
  Agent products(const Warp& warp) const {
    return static_cast<Agent>(threads_.size() + kMostMbarriers + number(warp));
  }
  std::string name(Agent agent) const;
  const Thread& thread(const Warp& warp, int lane) const {
    return threads_[32 * number(warp) + static_cast<size_t>(lane)];
  }

 private:
  void start(Thread& thread, Stacks& stacks);
  void resume(Thread& thread);
  void leave();
  void finish(Thread& thread);
  void abandon();
  void deliver_something();
  size_t choose_warp();
  uint32_t random();
  SharedAccesses::Observer thread() const {
    return {*ordering_, current->number, current->number, nullptr};
  }
  size_t offset(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) -
                               static_cast<const char*>(shared_.data()));
  }
  bool knows(const GlobalStores::Store& store) const;
  std::exception_ptr stuck() const;

  Launch& launch_;
  uint3 index_;
  uint64_t number_;
  SharedMemory& shared_;
  SharedAccesses& accesses_;
  Counters counters_;
  std::optional<Ordering> ordering_;
  std::optional<Hopper> hopper_;
  std::vector<Warp> warps_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> priorities_;  // of the warps
  boost::context::fiber scheduler_;
  const void* scheduler_stack_ = nullptr;  // its end, for the sanitizer
  size_t scheduler_stack_size_ = 0;
  bool yielded_ = false;  // the warp that is running
  bool lets_later_ = false;
  bool held_ = false;                        // where it lets later kernels begin
  std::vector<const Thread*> wait_earlier_;  // the threads that wait for earlier kernels
  std::exception_ptr error_;
  uint64_t random_state_;
  size_t exited_ = 0;
  size_t at_barrier_ = 0;
  Site barrier_site_ = {};
  // What threads have learnt of other blocks, and when.
  struct Learnt {
    Agent thread;
    Time time;
    Knowledge knowledge;
  };
  std::vector<Learnt> learnt_;
};

}  // namespace emulator

// Stacks for fibers, kept for reuse: a launch needs one for each CUDA thread of a block, over and
// over. Below each lies a page that must not be touched, so an overflow is a crash and no riddle.
#pragma once

#include <boost/context/stack_context.hpp>
#include <mutex>
#include <vector>

namespace emulator {

// May be used by several threads.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  boost::context::stack_context take();
  void give_back(const boost::context::stack_context& stack);

 private:
  std::mutex mutex_;
  std::vector<boost::context::stack_context> free_;
};

Stacks& stacks();  // of this process

// What Boost.Context wants of an allocator.
class StackAllocator {
 public:
  explicit StackAllocator(Stacks& stacks) : stacks_(&stacks) {}
  boost::context::stack_context allocate() { return stacks_->take(); }
  void deallocate(boost::context::stack_context& stack) { stacks_->give_back(stack); }

 private:
  Stacks* stacks_;
};

}  // namespace emulator

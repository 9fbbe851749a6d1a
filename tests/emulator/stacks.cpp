#include "stacks.h"

#include <sys/mman.h>

#include <new>

namespace emulator {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kStack = 256 * 1024;  // untouched pages cost nothing

}  // namespace

boost::context::stack_context Stacks::take() {
  boost::context::stack_context stack;
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      stack = free_.back();
      free_.pop_back();
      return stack;
    }
  }
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  stack.size = kStack;
  stack.sp = static_cast<char*>(memory) + kGuard + kStack;  // stacks grow down
  return stack;
}

void Stacks::give_back(const boost::context::stack_context& stack) {
  const std::lock_guard lock(mutex_);
  free_.push_back(stack);
}

Stacks& stacks() {
  static Stacks instance;
  return instance;
}

Stacks::~Stacks() {
  for (const auto& stack : free_) {
    munmap(static_cast<char*>(stack.sp) - stack.size - kGuard, stack.size + kGuard);
  }
}

}  // namespace emulator

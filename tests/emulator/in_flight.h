// Copies that the hardware makes on its own and reports to a barrier in shared memory: TMA, and
// cp.async after cp_async_arrive. They may complete at any moment and in any order. With late
// delivery they complete only when no thread of the block can run without them.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "error.h"

namespace emulator {

struct Thread;

class InFlight {
 public:
  struct Operation {
    Thread* thread;  // that started it
    Site site;
    std::function<void()> deliver;
  };
  void add(Operation operation) { operations_.push_back(std::move(operation)); }
  bool empty() const { return operations_.empty(); }
  const Operation& first() const { return operations_.front(); }

  // One of them, chosen by `random`.
  Operation take(uint32_t random) {
    std::swap(operations_[random % operations_.size()], operations_.back());
    Operation taken = std::move(operations_.back());
    operations_.pop_back();
    return taken;
  }

 private:
  std::vector<Operation> operations_;
};

}  // namespace emulator

// cp.async of one CUDA thread. The hardware may write the bytes at any moment between the copy
// and the wait for it; the emulator takes one of the two ends. Until the wait nobody may touch
// them, and after it only this thread: others need a barrier too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "error.h"
#include "ordering.h"

namespace emulator {

enum class Delivery {
  late,   // in the wait; until then the destination is NaN
  early,  // at once
};

class Copies {
 public:
  explicit Copies(Delivery delivery) : delivery_(delivery) {}

  // Of `size` bytes, the first `read` are copied and the others become zeros.
  void start(Site site, void* shared, const void* global, size_t size, size_t read);
  void commit();
  void wait(size_t pending_groups);

  // The number of copies that have been started; and the delivery of the first `count` of them,
  // after which other threads may rely on them and on what this thread had done until then.
  uint64_t started() const { return delivered_ + waiting_.size(); }
  void deliver_until(uint64_t count, Time until);

 private:
  struct Copy {
    Site site;
    void* shared;
    const void* global;
    size_t size, read;
  };
  static void move(const Copy& copy);

  Delivery delivery_;
  uint64_t delivered_ = 0;
  std::deque<Copy> waiting_;
  std::deque<uint64_t> groups_;  // the number of copies started when each group was committed
};

}  // namespace emulator

// cp.async of one CUDA thread. The hardware may write the bytes at any moment between the copy
// and the wait for it; the emulator takes one of the two ends.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "error.h"

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

 private:
  struct Copy {
    void* shared;
    const void* global;
    size_t size, read;
  };
  static void deliver(const Copy& copy);

  Delivery delivery_;
  std::vector<Copy> uncommitted_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace emulator

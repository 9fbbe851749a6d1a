// The two memories of a kernel and who may touch what: registered allocations of global memory,
// and a block's shared memory between guards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace emulator {

// The global memory that a launch may access. While nothing is registered, everything is allowed.
class Allocations {
 public:
  // Constant: no kernel writes it, so a kernel may read it before wait_for_earlier_kernels.
  void add(const void* begin, size_t bytes, const std::string& name, bool constant = false);
  void clear() { ranges_.clear(); }

  // Empty if [address, address + bytes) lies in one allocation, else a description of the error.
  std::string problem(const void* address, size_t bytes) const;

  // The allocation that has the address, or null.
  struct Range {
    uintptr_t begin, end;
    std::string name;
    bool constant;
  };
  const Range* find(const void* address) const;
  const std::vector<Range>& ranges() const { return ranges_; }

 private:
  std::vector<Range> ranges_;
};

Allocations& allocations();  // of the launches to come

// A block's shared memory: all NaN at first (each byte is 0xff, so every float, half and bfloat16
// is one). The guards on both sides are NaN too, and writing to them is an error, if a late one;
// built with AddressSanitizer, any access to them is one at once.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  void* data() const { return data_; }
  std::string problem(const void* address, size_t bytes) const;

  void poison();  // makes all of it NaN again, for the next block
  bool guards_intact() const;

 private:
  size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_;
};

enum class Use { load, store };  // an atomic operation is a store too

// Throw unless the running thread may access [address, address + bytes), which is aligned to its
// size in shared memory.
void check_global(Site site, const char* what, Use use, const void* address, size_t bytes);
void check_shared(Site site, const char* what, const void* address, size_t bytes);

void check_alignment(Site site, const char* what, const void* address, size_t bytes);

// Throws if the running thread has not waited for earlier kernels.
void check_waited(Site site, const char* what);

}  // namespace emulator

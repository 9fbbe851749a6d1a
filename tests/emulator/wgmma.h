// wgmma: the products of one warp, a quarter of those of its warpgroup. They are asynchronous:
// delivered late, operands are read in the wait for the group and results written in the
// wgmma_settle after it, and until then the accumulators are NaN; delivered early, all happens at
// once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "error.h"
#include "instructions.h"
#include "shared_accesses.h"

namespace emulator {

// d [64, n] = a [64, 16] * b [16, n], and + d with `accumulate`.
struct Wgmma {
  Half type;
  int n;              // at most 128
  bool b_transposed;  // [16, n] in memory, not [n, 16]
  float* d;           // n / 2 registers of the lane
  const uint32_t* a;  // 4 registers of the lane; null if a is in shared memory too
  uint64_t a_matrix;  // descriptors
  uint64_t b_matrix;
  bool accumulate;
};

// Of a matrix in shared memory, with the 128-byte swizzle.
uint64_t wgmma_descriptor(Site site, const void* shared, uint32_t leading_bytes,
                          uint32_t stride_bytes);

// For the running thread, with all of its warp.
void wgmma(Site site, Wgmma operands);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(Site site, size_t pending_groups);

// For the running thread: it is about to use its accumulators, or has set them, or registers of a.
void wgmma_settle(Site site, float* d, int count);
void wgmma_settle(Site site, const uint32_t* a);  // 4 registers

// The products that a warp has under way.
class WgmmaQueue {
 public:
  // Called for the last lane to arrive; operands[i] is what lane i brings.
  void start(Site site, const Wgmma* const (&operands)[32]);
  void fence();
  void commit();
  void wait(size_t pending_groups);
  void settle(Site site, int lane, float* d, int count);
  void settle(int lane, const uint32_t* a);

  // Throws if the lane may not leave the kernel yet.
  void check_exit(int lane) const;

 private:
  // The place where the first product without a wait was started; null if there is none.
  const Site* first_under_way() const;

  // The registers of d of the warp: where they are and what they will be.
  struct Accumulators {
    float* d[32];
    int n;
    float values[16][128];
    int under_way;       // products
    uint32_t unsettled;  // lanes that have not called wgmma_settle since the wait; then 0
    Site site;           // of the latest product
  };
  struct Product {
    Site site;
    Wgmma operands;                // of lane 0
    std::vector<uint32_t> chunks;  // of shared memory
    Accumulators* accumulators;
    const uint32_t* a[32];  // where the registers of a are, and what they held
    uint32_t a_then[32][4];
  };

  // What registers held at the latest wgmma_settle, and how many fences were before it.
  struct Settled {
    std::vector<uint32_t> content;
    uint64_t fences;
  };
  template <class Register>
  void note_settled(int lane, const Register* registers, int count);
  template <class Register>
  bool settled(int lane, const Register* registers, int count) const;

  Accumulators& find(Site site, const Wgmma* const (&operands)[32]);
  static bool untouched(const Accumulators& accumulators);
  void compute(Product& product);
  void finish(Product& product, const SharedAccesses::Observer& by);

  bool fenced_ = false;  // since the start or the last wait
  uint64_t fences_ = 0;
  std::map<const void*, Settled> settled_[32];         // of each lane
  std::map<const float*, Accumulators> accumulators_;  // by lane 0's
  std::vector<Product> uncommitted_;
  std::deque<std::vector<Product>> groups_;
};

}  // namespace emulator

#include "instructions.h"

#include <cmath>
#include <cstring>
#include <string>

#include "block.h"
#include "elements.h"
#include "include/builtins.h"

namespace emulator {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;

// ---- Shuffle and votes

struct Shuffle {
  uint64_t value;
  uint64_t result;
  int source_lane;
};

void combine_shuffle(Site site, void* const* operands, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* shuffle = static_cast<Shuffle*>(operands[lane]);
    if (!(mask >> shuffle->source_lane & 1)) {
      fail(site, "lane " + std::to_string(lane) + " shuffles from lane " +
                     std::to_string(shuffle->source_lane) + ", which takes no part");
    }
    shuffle->result = static_cast<const Shuffle*>(operands[shuffle->source_lane])->value;
  }
}

struct Vote {
  bool predicate;
  uint32_t result;
};

void combine_vote(Site, void* const* operands, uint32_t mask) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) votes |= uint32_t{static_cast<Vote*>(operands[lane])->predicate} << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Vote*>(operands[lane])->result = votes;
  }
}

void combine_sync_warp(Site, void* const*, uint32_t mask) {
  Block& block = *current->block;
  block.ordering().synchronise(block.first_thread(*current->warp), mask);
}

// ---- ldmatrix

struct Ldmatrix {
  uint32_t* r;
  const void* row;
  bool transposed;
};

// Lane 8 * j + i brings row i of matrix j. The register j of a lane gets the elements (row, column)
// and (row, column + 1) of it, row = lane / 4 and column = 2 * (lane % 4); with .trans, of its
// transpose.
// A lane gets what others have addressed, so all of them must know of what is stored there.
void combine_ldmatrix(Site site, void* const* operands, uint32_t) {
  uint16_t matrices[4][8][8];
  uintptr_t addresses[32];
  for (int lane = 0; lane < 32; ++lane) {
    const void* row = static_cast<const Ldmatrix*>(operands[lane])->row;
    memcpy(matrices[lane / 8][lane % 8], row, 16);
    addresses[lane] = reinterpret_cast<uintptr_t>(row);
  }
  current->block->load_shared_together(site, addresses);
  Counters& counters = current->block->counters();
  counters.shared_requests += 1;
  counters.shared_conflicts += bank_conflicts(addresses, kAllLanes, 16);
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operand = static_cast<const Ldmatrix*>(operands[lane]);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int j = 0; j < 4; ++j) {
      const auto& m = matrices[j];
      const uint32_t low = operand->transposed ? m[column][row] : m[row][column];
      const uint32_t high = operand->transposed ? m[column + 1][row] : m[row][column + 1];
      operand->r[j] = low | high << 16;
    }
  }
}

// ---- mma

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Fragments: a lane holds, with row = lane / 4 and column = 2 * (lane % 4), of
//   A [16, 16]  registers 0 to 3: (row, column), (row + 8, column), (row, column + 8),
//               (row + 8, column + 8), each with its right neighbour
//   B [16, 8]   registers 0 and 1: (column, row), (column + 8, row), each with the one below
//   D [16, 8]   0 and 1: (row, column) and its right neighbour; 2 and 3: (row + 8, column)
template <class T>
void combine_mma(Site, void* const* operands, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mma = static_cast<const Mma*>(operands[lane]);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      float* pair = &a[row + i % 2 * 8][column + i / 2 * 8];
      unpack<T>(mma->a[i], pair[0], pair[1]);
    }
    for (int i = 0; i < 2; ++i) {
      unpack<T>(mma->b[i], b[column + i * 8][row], b[column + i * 8 + 1][row]);
    }
  }
  float products[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) products[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Mma*>(operands[lane])->d;
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) d[i] += products[row + i / 2 * 8][column + i % 2];
  }
  current->block->counters().mma += 1;
}

constexpr Collective kShuffle = {"shuffle", &combine_shuffle};
constexpr Collective kVote = {"vote", &combine_vote};
constexpr Collective kSyncWarp = {"__syncwarp", &combine_sync_warp};
constexpr Collective kLdmatrix = {"ldmatrix", &combine_ldmatrix};
constexpr Collective kMmaBf16 = {"mma (bf16)", &combine_mma<__nv_bfloat16>};
constexpr Collective kMmaF16 = {"mma (f16)", &combine_mma<__half>};

}  // namespace

int lane() { return current->lane; }

uint64_t shuffle(Site site, unsigned mask, uint64_t bits, int source_lane) {
  Shuffle operands{bits, 0, source_lane};
  current->warp->meet(kShuffle, site, mask, &operands);
  return operands.result;
}

unsigned ballot(Site site, unsigned mask, bool predicate) {
  Vote operands{predicate, 0};
  current->warp->meet(kVote, site, mask, &operands);
  return operands.result;
}

void sync_warp(Site site, unsigned mask) { current->warp->meet(kSyncWarp, site, mask, nullptr); }

void sync_threads(Site site) { current->block->barrier(site); }

void thread_fence() { current->block->fence(); }

AtomicOperation::AtomicOperation(Site site, const void* address, size_t bytes)
    : lock_(current->block->launch().atomics.mutex) {
  check_alignment(site, "atomic operation", address, bytes);
  check_global(site, "atomic operation", Use::store, address, bytes);
  current->block->note_atomic(address);
}

void access_global(Site site, Access access, const void* address, size_t bytes) {
  const bool load = access == Access::global_load;
  const char* what = load ? "load" : "store";
  current->latest = site;
  check_alignment(site, what, address, bytes);
  check_global(site, what, load ? Use::load : Use::store, address, bytes);
  if (load) {
    current->block->note_load(site, address, bytes);
  } else {
    current->block->note_store(site, address, bytes);
  }
  current->warp->requests().add(current->lane, site, access, address, static_cast<uint32_t>(bytes));
}

void wait_for_earlier_kernels(Site site) { current->block->wait_for_earlier_kernels(site); }

void let_later_kernels_begin(Site site) { current->block->let_later_kernels_begin(site); }

template <class T>
T load_shared(Site site, const void* address) {
  current->latest = site;
  check_shared(site, "access to shared memory", address, sizeof(T));
  current->warp->requests().add(current->lane, site, Access::shared, address, sizeof(T));
  current->block->load_shared(site, address, sizeof(T));
  return *static_cast<const T*>(address);
}
template uint4 load_shared<uint4>(Site site, const void* address);
template uint2 load_shared<uint2>(Site site, const void* address);

void store_shared(Site site, void* address, uint4 value) {
  current->latest = site;
  check_shared(site, "access to shared memory", address, 16);
  current->warp->requests().add(current->lane, site, Access::shared, address, 16);
  current->block->store_shared(site, address, 16);
  *static_cast<uint4*>(address) = value;
}

uint32_t shared_offset(const void* address) {
  const auto* begin = static_cast<const char*>(current->block->shared().data());
  return static_cast<uint32_t>(static_cast<const char*>(address) - begin);
}

void cp_async(Site site, void* shared, const void* global, size_t size, size_t read) {
  current->latest = site;
  current->copies.start(site, shared, global, size, read);
}

void cp_async_commit() { current->copies.commit(); }

void cp_async_wait(size_t pending_groups) { current->copies.wait(pending_groups); }

void ldmatrix_x4(Site site, uint32_t (&r)[4], const void* shared_row, bool transposed) {
  check_shared(site, "ldmatrix of a row", shared_row, 16);
  Ldmatrix operands{r, shared_row, transposed};
  current->warp->meet(kLdmatrix, site, kAllLanes, &operands);
}

void mma_m16n8k16(Site site, Half type, float (&d)[4], const uint32_t (&a)[4],
                  const uint32_t (&b)[2]) {
  Mma operands{d, a, b};
  current->warp->meet(type == Half::bf16 ? kMmaBf16 : kMmaF16, site, kAllLanes, &operands);
}

float exp2_approx(float x) {
  constexpr float kSmallestNormal = 0x1p-126f;
  const float result = std::exp2(x);
  return result < kSmallestNormal ? 0.0f : result;
}

}  // namespace emulator

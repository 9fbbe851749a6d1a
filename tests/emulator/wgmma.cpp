#include "wgmma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "block.h"

namespace emulator {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;
constexpr uint32_t kPoison = 0xffffffff;  // a NaN

// ---- Operands in shared memory

// A descriptor's fields, in bytes.
struct Matrix {
  uint32_t start, leading, stride;
};

Matrix decode(Site site, const char* name, uint64_t descriptor) {
  const auto field = [&](int bit, int bits) {
    return static_cast<uint32_t>(descriptor >> bit & ((uint64_t{1} << bits) - 1));
  };
  const auto refuse = [&](const std::string& problem) {
    fail(site, std::string("descriptor of ") + name + ": " + problem);
  };
  constexpr uint64_t kFields = 0xc00e3fff3fff3fff;
  constexpr uint32_t kSwizzle128 = 1;
  if (descriptor & ~kFields) refuse("bits are set that have no meaning");
  if (field(62, 2) != kSwizzle128) refuse("another swizzle than that of 128 bytes");
  if (field(49, 3) != 0) refuse("a base offset, which is for matrices that begin within an atom");
  const Matrix matrix{field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4};
  if (matrix.start / 128 % 8 != 0) refuse("the matrix does not begin in row 0 of an atom");
  return matrix;
}

// Calls f(offset, first, k) for each 16 bytes: 8 elements from (first, k), in the direction of k.
// `first` counts rows of a or columns of b, from `begin`.
template <class F>
void for_each_chunk_k_major(const Matrix& matrix, int begin, int count, F f) {
  for (int first = begin; first < begin + count; ++first) {
    for (int k = 0; k < 16; k += 8) {
      const auto row = static_cast<uint32_t>(first);
      f(swizzle_128(matrix.start + row / 8 * matrix.stride + row % 8 * 128 + k * 2), first, k);
    }
  }
}

// The 8 elements are in the direction of n.
template <class F>
void for_each_chunk_n_major(const Matrix& matrix, int n, F f) {
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t column = 0; column < static_cast<uint32_t>(n); column += 8) {
      const uint32_t row = matrix.start + k / 8 * matrix.stride + k % 8 * 128;
      f(swizzle_128(row + column / 64 * matrix.leading + column % 64 * 2), static_cast<int>(column),
        static_cast<int>(k));
    }
  }
}

// Calls f(offset) for all that the warp reads in shared memory.
template <class F>
void for_each_chunk(Site site, const Wgmma& w, F f) {
  const auto of_chunk = [&](uint32_t offset, int, int) { f(offset); };
  if (!w.a) {
    const int row = static_cast<int>(current->block->number(*current->warp) % 4 * 16);
    for_each_chunk_k_major(decode(site, "a", w.a_matrix), row, 16, of_chunk);
  }
  const Matrix b = decode(site, "b", w.b_matrix);
  if (w.b_transposed) {
    for_each_chunk_n_major(b, w.n, of_chunk);
  } else {
    for_each_chunk_k_major(b, 0, w.n, of_chunk);
  }
}

float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
float widen(__half x) { return __half2float(x); }

template <class T>
void read_chunk(uint32_t offset, float (&values)[8]) {
  T elements[8];
  memcpy(elements, static_cast<const char*>(current->block->shared().data()) + offset, 16);
  for (int i = 0; i < 8; ++i) values[i] = widen(elements[i]);
}

template <class T>
void read_a(Site site, const Wgmma& w, const uint32_t (&registers)[32][4], float (&a)[16][16]) {
  if (w.a) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        T pair[2];
        memcpy(pair, &registers[lane][i], sizeof pair);
        float* at = &a[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8];
        at[0] = widen(pair[0]);
        at[1] = widen(pair[1]);
      }
    }
    return;
  }
  const int begin = static_cast<int>(current->block->number(*current->warp) % 4 * 16);
  for_each_chunk_k_major(decode(site, "a", w.a_matrix), begin, 16,
                         [&](uint32_t offset, int row, int k) {
                           float values[8];
                           read_chunk<T>(offset, values);
                           std::copy(values, values + 8, &a[row - begin][k]);
                         });
}

template <class T>
void read_b(Site site, const Wgmma& w, float (&b)[16][128]) {
  const Matrix matrix = decode(site, "b", w.b_matrix);
  float values[8];
  if (w.b_transposed) {
    for_each_chunk_n_major(matrix, w.n, [&](uint32_t offset, int column, int k) {
      read_chunk<T>(offset, values);
      std::copy(values, values + 8, &b[k][column]);
    });
  } else {
    for_each_chunk_k_major(matrix, 0, w.n, [&](uint32_t offset, int column, int k) {
      read_chunk<T>(offset, values);
      for (int i = 0; i < 8; ++i) b[k + i][column] = values[i];
    });
  }
}

template <int N>
void multiply(const float (&a)[16][16], const float (&b)[16][128], float (&d)[16][128]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      const float factor = a[i][k];
      for (int j = 0; j < N; ++j) d[i][j] += factor * b[k][j];
    }
  }
}

template <class T>
void multiply(Site site, const Wgmma& w, const uint32_t (&a_registers)[32][4],
              float (&d)[16][128]) {
  float a[16][16], b[16][128];
  read_a<T>(site, w, a_registers, a);
  read_b<T>(site, w, b);
  if (!w.accumulate) memset(d, 0, sizeof d);
  w.n == 64 ? multiply<64>(a, b, d) : multiply<128>(a, b, d);
}

// ---- Registers

// Calls f(register of d, row, column) for all of the warp.
template <class F>
void for_each_register(float* const (&d)[32], int n, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < n / 2; ++i) {
      f(d[lane][i], lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2);
    }
  }
}

bool same_bits(const float& x, const float& y) { return memcmp(&x, &y, sizeof x) == 0; }

bool hold(float* const (&d)[32], int n, const float (&values)[16][128]) {
  bool same = true;
  for_each_register(d, n, [&](const float& x, int row, int column) {
    same = same && same_bits(x, values[row][column]);
  });
  return same;
}

bool are_poisoned(float* const (&d)[32], int n) {
  float poison;
  memcpy(&poison, &kPoison, sizeof poison);
  bool same = true;
  for_each_register(d, n, [&](const float& x, int, int) { same = same && same_bits(x, poison); });
  return same;
}

bool late() { return current->block->launch().delivery == Delivery::late; }

// ---- What the lanes of a warp meet for

void combine_wgmma(Site site, void* const* operands, uint32_t) {
  const Wgmma* all[32];
  for (int lane = 0; lane < 32; ++lane) {
    all[lane] = static_cast<const Wgmma*>(operands[lane]);
    if (all[lane]->a_matrix != all[0]->a_matrix || all[lane]->b_matrix != all[0]->b_matrix ||
        all[lane]->accumulate != all[0]->accumulate) {
      fail(site, "wgmma with operands that differ between the lanes of a warp");
    }
  }
  current->warp->wgmma().start(site, all);
}

void combine_fence(Site site, void* const*, uint32_t) {
  warpgroup_step(site, "wgmma_fence");
  current->warp->wgmma().fence();
}

void combine_commit(Site site, void* const*, uint32_t) {
  warpgroup_step(site, "wgmma_commit");
  current->warp->wgmma().commit();
}

void combine_wait(Site site, void* const* operands, uint32_t) {
  const size_t pending = *static_cast<const size_t*>(operands[0]);
  warpgroup_step(site, "wgmma_wait", pending);
  current->warp->wgmma().wait(pending);
}

constexpr Collective kWgmma = {"wgmma", &combine_wgmma};
constexpr Collective kFence = {"wgmma_fence", &combine_fence};
constexpr Collective kCommit = {"wgmma_commit", &combine_commit};
constexpr Collective kWait = {"wgmma_wait", &combine_wait};

}  // namespace

WgmmaQueue::Accumulators& WgmmaQueue::find(Site site, const Wgmma* const (&operands)[32]) {
  const Wgmma& w = *operands[0];
  const auto [place, fresh] = accumulators_.try_emplace(w.d);
  Accumulators& found = place->second;
  float* d[32];
  for (int lane = 0; lane < 32; ++lane) d[lane] = operands[lane]->d;
  const bool known = !fresh && found.n == w.n && std::equal(d, d + 32, found.d);
  if (!fresh && found.under_way > 0) {
    const bool untouched = known && (late() ? are_poisoned(d, w.n) : hold(d, w.n, found.values));
    if (!untouched) fail(site, "accumulators have been touched while a wgmma has them");
  }
  // Products of the same shape, one after another, need no fence for their accumulators.
  const bool continues = known && (found.under_way > 0 || hold(d, w.n, found.values));
  if (!fenced_ && !(continues && w.accumulate && !w.a)) {
    fail(site, "wgmma without a wgmma_fence since the start or the last wgmma_wait");
  }
  if (!known || found.under_way == 0) {
    found.n = w.n;
    found.under_way = 0;
    std::copy(d, d + 32, found.d);
    for_each_register(d, w.n, [&](float& x, int row, int column) {
      found.values[row][column] = x;
      if (late()) memcpy(&x, &kPoison, sizeof x);
    });
  }
  return found;
}

void WgmmaQueue::start(Site site, const Wgmma* const (&operands)[32]) {
  const Wgmma& w = *operands[0];
  warpgroup_step(site, "wgmma", w.a_matrix ^ uint64_t{w.accumulate}, w.b_matrix);
  Block& block = *current->block;

  uint64_t fence = UINT64_MAX;
  for (int lane = 0; lane < 32; ++lane) {
    fence = std::min(fence, block.thread(*current->warp, lane).proxy_fence);
  }
  for_each_chunk(site, w, [&](uint32_t offset) {
    const auto* chunk = static_cast<const char*>(block.shared().data()) + offset;
    const std::string problem = block.shared().problem(chunk, 16);
    if (!problem.empty()) fail(site, "wgmma reads 16 bytes out of bounds: it " + problem);
    block.hopper().chunks.begin_wgmma(site, offset, fence);
  });

  Product product{site, w, &find(site, operands), {}, {}};
  for (int lane = 0; lane < 32 && w.a; ++lane) {
    product.a[lane] = operands[lane]->a;
    memcpy(product.a_then[lane], operands[lane]->a, sizeof product.a_then[lane]);
  }
  ++product.accumulators->under_way;
  if (!late()) compute(product);
  uncommitted_.push_back(product);
  block.counters().wgmma_flops += 2 * 16 * 16 * static_cast<uint64_t>(w.n);
}

void WgmmaQueue::compute(Product& product) {
  Accumulators& to = *product.accumulators;
  if (product.operands.type == Half::bf16) {
    multiply<__nv_bfloat16>(product.site, product.operands, product.a_then, to.values);
  } else {
    multiply<__half>(product.site, product.operands, product.a_then, to.values);
  }
  if (late() && to.under_way > 1) return;
  for_each_register(to.d, to.n, [&](float& x, int row, int column) { x = to.values[row][column]; });
}

void WgmmaQueue::commit() { groups_.push_back(std::exchange(uncommitted_, {})); }

void WgmmaQueue::wait(size_t pending_groups) {
  fenced_ = false;
  while (groups_.size() > pending_groups) {
    for (Product& product : groups_.front()) finish(product);
    groups_.pop_front();
  }
}

const Site* WgmmaQueue::first_under_way() const {
  for (const std::vector<Product>& group : groups_) {
    if (!group.empty()) return &group.front().site;
  }
  return uncommitted_.empty() ? nullptr : &uncommitted_.front().site;
}

void WgmmaQueue::finish(Product& product) {
  const Wgmma& w = product.operands;
  Accumulators& to = *product.accumulators;
  for (int lane = 0; lane < 32 && w.a; ++lane) {
    if (memcmp(product.a[lane], product.a_then[lane], sizeof product.a_then[lane]) != 0) {
      fail(product.site, "registers of a have changed before the wait for this wgmma");
    }
  }
  const bool untouched = late() ? are_poisoned(to.d, to.n) : hold(to.d, to.n, to.values);
  if (!untouched) {
    fail(product.site, "accumulators have been touched before the wait for this wgmma");
  }
  if (late()) compute(product);
  for_each_chunk(product.site, w,
                 [](uint32_t offset) { current->block->hopper().chunks.end_wgmma(offset); });
  --to.under_way;
}

uint64_t wgmma_descriptor(Site site, const void* shared, uint32_t leading_bytes,
                          uint32_t stride_bytes) {
  check_shared(site, "wgmma operand", shared, 16);
  constexpr uint32_t kMost = 0x3fff0;
  for (const uint32_t bytes : {leading_bytes, stride_bytes}) {
    if (bytes % 16 != 0 || bytes > kMost) {
      fail(site, "descriptor with an offset of " + std::to_string(bytes) +
                     " bytes, expected a multiple of 16 up to " + std::to_string(kMost));
    }
  }
  return uint64_t{1} << 62 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{leading_bytes >> 4} << 16 | shared_offset(shared) >> 4;
}

void wgmma(Site site, Wgmma operands) {
  hopper(site);
  current->warp->meet(kWgmma, site, kAllLanes, &operands);
}

void wgmma_fence(Site site) {
  hopper(site);
  current->warp->meet(kFence, site, kAllLanes, nullptr);
}

void wgmma_commit(Site site) {
  hopper(site);
  current->warp->meet(kCommit, site, kAllLanes, nullptr);
}

void wgmma_wait(Site site, size_t pending_groups) {
  hopper(site);
  current->warp->meet(kWait, site, kAllLanes, &pending_groups);
}

}  // namespace emulator

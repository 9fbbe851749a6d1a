#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "block.h"
#include "wgmma_operands.h"

namespace emulator {
namespace {

constexpr uint32_t kAllLanes = 0xffffffff;
constexpr uint32_t kPoison = 0xffffffff;  // a NaN

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
  if (found.unsettled != 0 && !(continues && w.accumulate)) {
    fail(site, "accumulators are used anew, and not all lanes have called wgmma_settle for them");
  }
  found.site = site;
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
  std::vector<uint32_t> chunks = chunks_of(site, w);
  for (const uint32_t offset : chunks) {
    const auto* chunk = static_cast<const char*>(block.shared().data()) + offset;
    const std::string problem = block.shared().problem(chunk, 16);
    if (!problem.empty()) fail(site, "wgmma reads 16 bytes out of bounds: it " + problem);
    block.hopper().chunks.begin_wgmma(site, offset, fence);
  }

  Product product{site, w, std::move(chunks), &find(site, operands), {}, {}};
  for (int lane = 0; lane < 32 && w.a; ++lane) {
    product.a[lane] = operands[lane]->a;
    memcpy(product.a_then[lane], operands[lane]->a, sizeof product.a_then[lane]);
  }
  ++product.accumulators->under_way;
  if (!late()) compute(product);
  uncommitted_.push_back(std::move(product));
  block.counters().wgmma_flops += 2 * 16 * 16 * static_cast<uint64_t>(w.n);
}

void WgmmaQueue::compute(Product& product) {
  Accumulators& to = *product.accumulators;
  multiply(product.site, product.operands, product.a_then, to.values);
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
  for (const uint32_t offset : product.chunks) {
    current->block->hopper().chunks.end_wgmma(offset);
  }
  if (--to.under_way == 0) to.unsettled = kAllLanes;
}

void WgmmaQueue::settle(Site site, int lane, const float* d) {
  for (auto& [first, accumulators] : accumulators_) {
    if (accumulators.d[lane] != d) continue;
    if (accumulators.under_way > 0) {
      fail(site,
           "wgmma_settle without a wgmma_wait for the product at " + to_text(accumulators.site));
    }
    accumulators.unsettled &= ~(1u << lane);
  }
}

void WgmmaQueue::check_exit(int lane) const {
  const std::string leaves = "lane " + std::to_string(lane) + " leaves the kernel without a ";
  if (const Site* site = first_under_way()) fail(*site, leaves + "wgmma_wait for this");
  for (const auto& [first, accumulators] : accumulators_) {
    if (accumulators.unsettled >> lane & 1) {
      fail(accumulators.site, leaves + "wgmma_settle for the results of this");
    }
  }
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

void wgmma_settle(Site site, const float* d) {
  hopper(site);
  current->warp->wgmma().settle(site, current->lane, d);
}

void wgmma_wait(Site site, size_t pending_groups) {
  hopper(site);
  current->warp->meet(kWait, site, kAllLanes, &pending_groups);
}

}  // namespace emulator

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
constexpr uint32_t kPoison = 0xffbfffff;  // a signalling NaN: it does not survive arithmetic

// ---- Registers

// Calls f(register of d, row, column) for all of a lane, or of the warp.
template <class F>
void for_each_register(float* const (&d)[32], int n, int lane, F f) {
  for (int i = 0; i < n / 2; ++i) {
    f(d[lane][i], lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2);
  }
}
template <class F>
void for_each_register(float* const (&d)[32], int n, F f) {
  for (int lane = 0; lane < 32; ++lane) for_each_register(d, n, lane, f);
}

bool is(const float& x, const float& value) { return memcmp(&x, &value, sizeof x) == 0; }

void poison(float& x) { memcpy(&x, &kPoison, sizeof x); }
bool is_poisoned(const float& x) { return memcmp(&x, &kPoison, sizeof x) == 0; }

// The running warp, as it reads operands.
SharedAccesses::Observer warp_of_wgmma() {
  Block& block = *current->block;
  const Warp& warp = *current->warp;
  const Clock& common = block.ordering().common(block.first_thread(warp), kAllLanes);
  return {block.ordering(), block.products(warp), 0, &common};
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
  // Products of the same shape, one after another, need no fence for their accumulators.
  const bool continues = known && untouched(found);
  if (!fresh && found.under_way > 0 && !continues) {
    fail(site, "accumulators have been touched while a wgmma has them");
  }
  if (!fenced_ && !(continues && w.accumulate && !w.a)) {
    fail(site, "wgmma without a wgmma_fence since the start or the last wgmma_wait");
  }
  if (found.unsettled != 0 && !(continues && w.accumulate)) {
    fail(site, "accumulators are used anew, and not all lanes have called wgmma_settle for them");
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (w.accumulate && !continues && !settled(lane, d[lane], w.n / 2)) {
      fail(site, "accumulators have been set without a wgmma_settle before the wgmma_fence");
    }
    if (w.a && !settled(lane, operands[lane]->a, 4)) {
      fail(site, "registers of a have been set without a wgmma_settle before the wgmma_fence");
    }
  }
  found.site = site;
  if (!continues) {
    found.n = w.n;
    std::copy(d, d + 32, found.d);
    for_each_register(d, w.n,
                      [&](float& x, int row, int column) { found.values[row][column] = x; });
  }
  if (found.under_way == 0 && late()) {
    for_each_register(d, w.n, [](float& x, int, int) { poison(x); });
  }
  found.unsettled = 0;
  return found;
}

// Nothing has been done to the registers since the last product had them.
bool WgmmaQueue::untouched(const Accumulators& a) {
  bool same = true;
  for (int lane = 0; lane < 32; ++lane) {
    const bool under_way = late() && (a.under_way > 0 || a.unsettled >> lane & 1);
    for_each_register(a.d, a.n, lane, [&](const float& x, int row, int column) {
      same = same && (under_way ? is_poisoned(x) : is(x, a.values[row][column]));
    });
  }
  return same;
}

template <class Register>
void WgmmaQueue::note_settled(int lane, const Register* registers, int count) {
  Settled& settled = settled_[lane][registers];
  settled.content.resize(static_cast<size_t>(count));
  memcpy(settled.content.data(), registers, static_cast<size_t>(count) * sizeof *registers);
  settled.fences = fences_;
}

template <class Register>
bool WgmmaQueue::settled(int lane, const Register* registers, int count) const {
  const auto found = settled_[lane].find(registers);
  if (found == settled_[lane].end() || found->second.fences == fences_) return false;
  const std::vector<uint32_t>& content = found->second.content;
  return content.size() == static_cast<size_t>(count) &&
         memcmp(content.data(), registers, content.size() * sizeof *registers) == 0;
}

void WgmmaQueue::start(Site site, const Wgmma* const (&operands)[32]) {
  const Wgmma& w = *operands[0];
  warpgroup_step(site, "wgmma", w.a_matrix ^ uint64_t{w.accumulate}, w.b_matrix);
  Block& block = *current->block;

  uint64_t fence = UINT64_MAX;
  for (int lane = 0; lane < 32; ++lane) {
    fence = std::min(fence, block.thread(*current->warp, lane).proxy_fence);
  }
  const SharedAccesses::Observer by = warp_of_wgmma();
  std::vector<uint32_t> chunks = chunks_of(site, w);
  for (const uint32_t offset : chunks) {
    const auto* chunk = static_cast<const char*>(block.shared().data()) + offset;
    const std::string problem = block.shared().problem(chunk, 16);
    if (!problem.empty()) fail(site, "wgmma reads 16 bytes out of bounds: it " + problem);
    block.hopper().chunks.begin_wgmma(site, offset, fence);
    block.accesses().check_load(site, by, offset, 16);
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
  if (late()) return;
  for_each_register(to.d, to.n, [&](float& x, int row, int column) { x = to.values[row][column]; });
}

void WgmmaQueue::fence() {
  fenced_ = true;
  ++fences_;
}

void WgmmaQueue::commit() { groups_.push_back(std::exchange(uncommitted_, {})); }

void WgmmaQueue::wait(size_t pending_groups) {
  fenced_ = false;
  if (groups_.size() <= pending_groups) return;
  const SharedAccesses::Observer by = warp_of_wgmma();
  while (groups_.size() > pending_groups) {
    for (Product& product : groups_.front()) finish(product, by);
    groups_.pop_front();
  }
  Block& block = *current->block;
  const Warp& warp = *current->warp;
  block.ordering().learn(block.first_thread(warp), kAllLanes, block.products(warp));
}

const Site* WgmmaQueue::first_under_way() const {
  for (const std::vector<Product>& group : groups_) {
    if (!group.empty()) return &group.front().site;
  }
  return uncommitted_.empty() ? nullptr : &uncommitted_.front().site;
}

void WgmmaQueue::finish(Product& product, const SharedAccesses::Observer& by) {
  const Wgmma& w = product.operands;
  Accumulators& to = *product.accumulators;
  for (int lane = 0; lane < 32 && w.a; ++lane) {
    if (memcmp(product.a[lane], product.a_then[lane], sizeof product.a_then[lane]) != 0) {
      fail(product.site, "registers of a have changed before the wait for this wgmma");
    }
  }
  if (!untouched(to)) {
    fail(product.site, "accumulators have been touched before the wait for this wgmma");
  }
  if (late()) compute(product);
  Block& block = *current->block;
  for (const uint32_t offset : product.chunks) {
    block.hopper().chunks.end_wgmma(offset);
    block.accesses().note_load(product.site, by, offset, 16, by.ordering.now(by.agent));
  }
  if (--to.under_way == 0) to.unsettled = kAllLanes;
}

void WgmmaQueue::settle(Site site, int lane, float* d, int count) {
  for (auto& [first, accumulators] : accumulators_) {
    if (accumulators.d[lane] != d) continue;
    const auto& found = accumulators;
    if (found.under_way > 0) {
      fail(site, "wgmma_settle without a wgmma_wait for the product at " + to_text(found.site));
    }
    if (!(found.unsettled >> lane & 1)) continue;
    accumulators.unsettled &= ~(1u << lane);
    if (!late()) continue;
    for_each_register(found.d, found.n, lane, [&](float& x, int row, int column) {
      if (!is_poisoned(x)) {
        fail(site, "accumulators have been touched without a wgmma_settle since the wait for " +
                       to_text(found.site));
      }
      x = found.values[row][column];
    });
  }
  note_settled(lane, d, count);
}

void WgmmaQueue::settle(int lane, const uint32_t* a) { note_settled(lane, a, 4); }

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

void wgmma_settle(Site site, float* d, int count) {
  hopper(site);
  current->warp->wgmma().settle(site, current->lane, d, count);
}

void wgmma_settle(Site site, const uint32_t* a) {
  hopper(site);
  current->warp->wgmma().settle(current->lane, a);
}

void wgmma_wait(Site site, size_t pending_groups) {
  hopper(site);
  current->warp->meet(kWait, site, kAllLanes, &pending_groups);
}

}  // namespace emulator

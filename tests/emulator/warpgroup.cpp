#include "warpgroup.h"

#include <algorithm>
#include <string>
#include <utility>

#include "block.h"

namespace emulator {
namespace {

constexpr size_t kRegistersOfMultiprocessor = 65536;

}  // namespace

void Warpgroup::step(size_t warp, const Step& step) {
  const size_t i = done_[warp]++ - trimmed_;
  if (i == steps_.size()) {
    steps_.push_back(step);
  } else {
    const Step& other = steps_[i];
    if (other.instruction != step.instruction || !(other.site == step.site)) {
      fail(step.site, std::string("the warps of a warpgroup diverge: this one comes to ") +
                          step.instruction + ", another to " + other.instruction + " at " +
                          to_text(other.site));
    }
    if (!std::equal(step.operands, step.operands + 2, other.operands)) {
      fail(step.site, std::string(step.instruction) +
                          " with operands that differ between the warps of a warpgroup");
    }
  }
  while (!steps_.empty() && *std::min_element(done_, done_ + 4) > trimmed_) {
    steps_.pop_front();
    ++trimmed_;
  }
}

// A launch gives each thread the same, a multiple of 8, of which there are at most 256.
RegisterPool::RegisterPool(size_t warps, size_t threads) {
  const size_t share = std::min<size_t>(256, kRegistersOfMultiprocessor / threads / 8 * 8);
  registers_.assign(warps, static_cast<int>(share));
}

size_t RegisterPool::warp() const { return current->block->number(*current->warp); }

void RegisterPool::increase(Site site, int registers) {
  int& own = registers_[warp()];
  if (own == registers) return;  // another lane has got them for all
  if (registers < own) {
    fail(site,
         "registers_increase to " + std::to_string(registers) + " from " + std::to_string(own));
  }
  while (own != registers && free_ < registers - own) {
    waiting_.push_back(current);
    current->block->suspend("registers_increase", site);
  }
  if (own == registers) return;
  free_ -= registers - own;
  own = registers;
}

void RegisterPool::decrease(Site site, int registers) {
  int& own = registers_[warp()];
  if (own == registers) return;
  if (registers > own) {
    fail(site,
         "registers_decrease to " + std::to_string(registers) + " from " + std::to_string(own));
  }
  free_ += own - registers;
  own = registers;
  for (const Thread* thread : std::exchange(waiting_, {})) {
    thread->warp->wake(1u << thread->lane);
  }
}

}  // namespace emulator

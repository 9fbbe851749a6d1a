#include "stream.h"

#include <algorithm>
#include <utility>

#include "run.h"

namespace emulator {
namespace {

// The later kernel may read what is constant before it waits for the earlier one, which may not
// have stored it by then.
void check_constants(const Launch& later, const Launch& earlier) {
  for (const Allocations::Range& range : later.allocations.ranges()) {
    if (!range.constant) continue;
    const auto store = earlier.stores.find_between(range.begin, range.end);
    if (!store) continue;
    throw Error(later.kernel + " may begin before " + earlier.kernel + " is done, which stores " +
                range.name + " at " + to_text(store->site) + ": it is not constant");
  }
}

}  // namespace

void Stream::Running::run() {
  for (Resident& resident : blocks) {
    if (!resident.block.ended()) resident.block.run();
  }
}

bool Stream::Running::lets_later_kernels_begin() const {
  return std::all_of(blocks.begin(), blocks.end(), [](const Resident& resident) {
    return resident.block.lets_later_kernels_begin();
  });
}

void Stream::check_thread() const {
  if (std::this_thread::get_id() == thread_) return;
  throw Error("a thread uses the stream of another thread, expected the thread that began it");
}

void Stream::add(std::unique_ptr<Launch> launch) {
  check_thread();
  try {
    start(std::move(launch));
  } catch (...) {
    running_.clear();
    throw;
  }
}

void Stream::start(std::unique_ptr<Launch> launch) {
  if (!launch->overlaps) finish();
  while (!running_.empty() && !running_.back().lets_later_kernels_begin()) finish_first();
  launch->waits = !running_.empty();
  launch->holds = true;
  Running& last = running_.emplace_back();
  last.launch = std::move(launch);
  for (const uint3 index : shuffled_blocks(*last.launch)) {
    last.blocks.emplace_back(*last.launch, index);
  }
  last.run();
}

void Stream::when_done(std::function<void()> action) {
  check_thread();
  if (running_.empty()) return action();
  running_.back().actions.push_back(std::move(action));
}

void Stream::finish() {
  try {
    while (!running_.empty()) finish_first();
  } catch (...) {
    running_.clear();
    throw;
  }
}

void Stream::finish_first() {
  Running& first = running_.front();
  first.launch->holds = false;
  first.run();
  Counters counters;
  for (Resident& resident : first.blocks) counters.add(resident.block.counters());
  record(*first.launch, counters);
  for (const Running& later : running_) {
    if (&later != &first) check_constants(*later.launch, *first.launch);
  }
  for (const auto& action : first.actions) action();
  running_.pop_front();
  if (running_.empty()) return;
  running_.front().launch->waits = false;
  running_.front().run();
}

}  // namespace emulator

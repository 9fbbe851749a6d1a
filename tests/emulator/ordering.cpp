#include "ordering.h"

#include <algorithm>
#include <utility>

namespace emulator {

Clock::~Clock() {
  if (times_ && --times_->uses == 0) delete times_;
}

Time* Clock::own(size_t agents) {
  if (!times_) {
    times_ = new Times{1, std::vector<Time>(agents, 0)};
  } else if (times_->uses > 1) {
    --times_->uses;
    times_ = new Times{1, times_->at};
  }
  return times_->at.data();
}

void Clock::join(const Clock& other, size_t agents) {
  if (!other.times_ || other.times_ == times_) return;
  if (!times_) {
    *this = other;
    return;
  }
  Time* const mine = own(agents);
  const Time* const theirs = other.times_->at.data();
  for (size_t i = 0; i < agents; ++i) mine[i] = std::max(mine[i], theirs[i]);
}

void Clock::limit(const Clock& other, size_t agents) {
  if (other.times_ == times_) return;
  if (!other.times_) {
    *this = Clock();
    return;
  }
  if (!times_) return;
  Time* const mine = own(agents);
  const Time* const theirs = other.times_->at.data();
  for (size_t i = 0; i < agents; ++i) mine[i] = std::min(mine[i], theirs[i]);
}

bool Clock::covers(const Time* times, size_t agents) const {
  if (!times_) return std::all_of(times, times + agents, [](Time time) { return time == 0; });
  const Time* const mine = times_->at.data();
  uint32_t later = 0;
  for (size_t i = 0; i < agents; ++i) later |= mine[i] < times[i];  // all of them, as vectors
  return later == 0;
}

std::vector<Time> Clock::times(size_t agents) const {
  return times_ ? times_->at : std::vector<Time>(agents, 0);
}

const Clock& Ordering::common(Agent first, uint32_t lanes) {
  bool begun = false;
  for (Agent lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (!begun) {
      common_ = clocks_[first + lane];
      begun = true;
    } else {
      common_.limit(clocks_[first + lane], agents_);
    }
  }
  return common_;
}

void Ordering::synchronise(Agent first, uint32_t lanes) {
  Clock joined;
  for (Agent lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) joined.join(clocks_[first + lane], agents_);
  }
  for (Agent lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) joined.set(first + lane, times_[first + lane]++, agents_);
  }
  for (Agent lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) clocks_[first + lane] = joined;
  }
}

void Ordering::synchronise() {
  Clock joined, latest;
  for (const Clock& clock : clocks_) {
    if (!clock.same(latest)) joined.join(clock, agents_);
    latest = clock;
  }
  for (Agent thread = 0; thread < clocks_.size(); ++thread) {
    joined.set(thread, times_[thread]++, agents_);
  }
  for (Clock& clock : clocks_) clock = joined;
}

void Ordering::release(Agent agent, Clock& into) {
  if (agent < clocks_.size()) into.join(clocks_[agent], agents_);
  into.set(agent, times_[agent]++, agents_);
}

void Ordering::release(Agent first, uint32_t lanes, Clock& into) {
  Clock latest;
  for (Agent lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Clock& clock = clocks_[first + lane];
    if (!clock.same(latest)) into.join(clock, agents_);
    latest = clock;
  }
  for (Agent lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) into.set(first + lane, times_[first + lane]++, agents_);
  }
}

void Ordering::acquire(Agent thread, const Clock& from) {
  Clock& clock = clocks_[thread];
  // Lanes of a warp mostly know the same, and come to learn the same.
  if (!(clock.same(learnt_[0]) && from.same(learnt_[1]))) {
    learnt_[0] = clock;
    learnt_[1] = from;
    learnt_[2] = clock;
    learnt_[2].join(from, agents_);
  }
  clock = learnt_[2];
}

void Ordering::learn(Agent first, uint32_t lanes, Agent agent) {
  Clock done;
  release(agent, done);
  for (Agent lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) acquire(first + lane, done);
  }
}

std::shared_ptr<const std::vector<Time>> Ordering::publish(Agent thread) {
  std::vector<Time> times = clocks_[thread].times(agents_);
  times[thread] = times_[thread]++;
  return std::make_shared<const std::vector<Time>>(std::move(times));
}

}  // namespace emulator

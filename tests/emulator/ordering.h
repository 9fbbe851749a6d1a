// The happens-before relation of a block: which accesses of other threads are ordered before what a
// thread does now, by barriers alone. It is kept in vector clocks (Flanagan and Freund 2009,
// "FastTrack") and does not depend on the order in which threads happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

// An agent accesses memory: a thread, with its number in the block; or, with the numbers after the
// threads, the copies that report to a barrier and the products of a warp.
using Agent = uint32_t;

// The time of an agent: how often it has told other agents what it did so far.
using Time = uint32_t;
constexpr Time kUnfinished = UINT32_MAX;  // of an access that is under way: no agent may rely on it

// For each agent, the time up to which its accesses are known. Copies share memory until they
// change. For one thread of the process.
class Clock {
 public:
  Clock() = default;
  Clock(const Clock& other) : times_(other.times_) {
    if (times_) ++times_->uses;
  }
  Clock& operator=(Clock other) {
    std::swap(times_, other.times_);
    return *this;
  }
  ~Clock();

  Time at(Agent agent) const { return times_ ? times_->at[agent] : 0; }
  bool covers(const Time* times, size_t agents) const;  // knows all of these
  bool same(const Clock& other) const { return times_ == other.times_; }
  void set(Agent agent, Time time, size_t agents) { own(agents)[agent] = time; }
  void join(const Clock& other, size_t agents);   // knows what either knows
  void limit(const Clock& other, size_t agents);  // knows what both know
  std::vector<Time> times(size_t agents) const;

 private:
  struct Times {
    uint32_t uses;
    std::vector<Time> at;
  };
  Time* own(size_t agents);

  Times* times_ = nullptr;
};

class Ordering {
 public:
  // The agents after the threads are `others`.
  Ordering(size_t threads, size_t others)
      : agents_(threads + others), clocks_(threads), times_(agents_, 1) {}

  size_t agents() const { return agents_; }
  Time now(Agent agent) const { return times_[agent]; }

  // Whether the thread may rely on an access of the agent.
  bool knows(Agent thread, Agent agent, Time time) const {
    return time != kUnfinished && (agent == thread || clocks_[thread].at(agent) >= time);
  }

  // What a thread may rely on, apart from its own accesses.
  const Clock& clock(Agent thread) const { return clocks_[thread]; }

  // What all lanes of the warp that begins at thread `first` may rely on.
  const Clock& common(Agent first, uint32_t lanes);

  // These lanes learn of all that any of them has done: __syncwarp.
  void synchronise(Agent first, uint32_t lanes);
  // All threads do: __syncthreads.
  void synchronise();

  // Publishes what an agent, or the lanes of a warp, have done and know so far, in `into`; and
  // learns it from there.
  void release(Agent agent, Clock& into);
  void release(Agent first, uint32_t lanes, Clock& into);
  void acquire(Agent thread, const Clock& from);

  // Lanes of a warp learn of what an agent that works on its own has done so far.
  void learn(Agent first, uint32_t lanes, Agent agent);

  // What a thread has done and knows so far, published for other blocks.
  std::shared_ptr<const std::vector<Time>> publish(Agent thread);

 private:
  size_t agents_;
  std::vector<Clock> clocks_;  // of the threads
  std::vector<Time> times_;
  Clock common_;
  Clock learnt_[3];  // the latest acquire: what was known, what was learnt, and both together
};

}  // namespace emulator

#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mistral::cpu {
namespace {

// How long a thread spins before it sleeps. Workers spin while they wait for the next loop, and
// callers while they wait for the workers. Python usually takes less time than this from one op to
// the next, so the workers stay awake for a whole decode step. Otherwise each op would have to wake
// them, which takes about as long as a small op.
constexpr std::chrono::microseconds kWatch{100};

// The most threads that share a loop, however many a caller asks for. If there were more than a few
// threads for each processor, they would only take turns.
int most_threads() {
  static const int most = std::max(16, 4 * static_cast<int>(std::thread::hardware_concurrency()));
  return most;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `happened` returns true, but not longer than kWatch. Returns whether `happened`
// returned true.
template <class F>
bool watch(const F& happened) {
  const auto stop = std::chrono::steady_clock::now() + kWatch;
  do {
    for (int i = 0; i < 32; ++i) {
      if (happened()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < stop);
  return false;
}

// A caller publishes a loop by adding 1 to `loop_` under `mutex_`. Workers that wait for a loop
// spin for a while, then sleep. A worker that sees a new loop joins it if `wanted_` is not 0. The
// caller and the workers inside the loop claim its tasks from `next_`. The caller returns when no
// task is left to claim and no worker is inside the loop any more. `loop_` and `inside_` are atomic
// because threads watch them without the lock.
class Pool {
 public:
  void run(int threads, int64_t tasks, void (*run)(const void*, int64_t), const void* context) {
    std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock() || threads <= 1 || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) run(context, task);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int helpers = have_workers(static_cast<int>(std::min<int64_t>(tasks, threads)) - 1);
      run_ = run;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers;
      loop_.fetch_add(1, std::memory_order_release);
    }
    published_.notify_all();
    claim();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0;  // a worker that wakes after this finds no loop to join
    }
    const auto all_left = [this] { return inside_.load(std::memory_order_acquire) == 0; };
    if (watch(all_left)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, all_left);
  }

 private:
  // Starts workers until there are `wanted` workers. If the system refuses to start one, the
  // existing workers must do. Returns the number of workers, but at most `wanted`.
  int have_workers(int wanted) {
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        workers_.emplace_back(&Pool::work, this, loop_.load());
      }
    } catch (const std::system_error&) {
    }
    return std::min(wanted, static_cast<int>(workers_.size()));
  }

  void claim() {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      run_(context_, task);
    }
  }

  void work(uint64_t seen) {
    const auto published = [&] { return loop_.load(std::memory_order_acquire) != seen; };
    for (;;) {
      watch(published);
      {
        std::unique_lock<std::mutex> lock(mutex_);
        published_.wait(lock, published);
        seen = loop_;
        if (wanted_ == 0) continue;
        --wanted_;
        ++inside_;
      }
      claim();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--inside_ == 0) finished_.notify_one();
    }
  }

  std::mutex callers_;  // held by the caller whose loop the workers run
  std::mutex mutex_;    // held to change the members below, except next_
  std::condition_variable published_, finished_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> loop_{0};
  int wanted_ = 0;              // the number of workers that may still join the loop
  std::atomic<int> inside_{0};  // the number of workers inside the loop
  void (*run_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
};

// The pool is never destroyed, because workers may still wait in it while the process exits. A
// forked child has none of the threads of its parent, so it starts with a new pool.
Pool* pool = nullptr;

void make_pool() { pool = new Pool; }

}  // namespace

void parallel_for(int threads, int64_t tasks, void (*run)(const void*, int64_t),
                  const void* context) {
  static std::once_flag once;
  std::call_once(once, [] {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
  });
  pool->run(std::min(threads, most_threads()), tasks, run, context);
}

void parallel_ranges(int threads, int64_t count, int64_t unit, int64_t least,
                     void (*run)(const void*, int64_t, int64_t), const void* context) {
  threads = std::min(threads, most_threads());
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t) {
    for (int64_t begin = next.load(std::memory_order_relaxed); begin < count;) {
      const int64_t share = (count - begin) / (2 * threads) / unit * unit;
      const int64_t end = std::min(count, begin + std::max(least, share));
      if (next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
        run(context, begin, end);
        begin = next.load(std::memory_order_relaxed);
      }
    }
  });
}

}  // namespace mistral::cpu

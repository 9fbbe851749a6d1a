// Loops of parallel_for one right after another, with threads that fall behind.
// tests/cpu/test_threads.py builds this together with csrc/cpu/parallel.cpp, for ThreadSanitizer.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <random>

#include "../../csrc/cpu/parallel.h"

// Takes the place of the C library's: now and then the thread sleeps after it has let go of a
// mutex. So a worker that has just joined a loop, or is about to leave it, misses what happens
// meanwhile, as it would now and then on a busy machine.
extern "C" int pthread_mutex_unlock(pthread_mutex_t* mutex) {
  using Unlock = int (*)(pthread_mutex_t*);
  static const auto unlock = reinterpret_cast<Unlock>(dlsym(RTLD_NEXT, "pthread_mutex_unlock"));
  const int status = unlock(mutex);
  static std::atomic<unsigned> threads;
  thread_local std::minstd_rand random(++threads);
  if (random() % 4 == 0) usleep(random() % 64);
  return status;
}

int main() {
  constexpr int kRounds = 500, kSizes = 5, kMost = 40;
  constexpr int64_t kTasks[kSizes] = {2, 40, 3, 2, 9};
  static std::atomic<int> runs[kSizes][kMost];
  for (int round = 0; round < kRounds; ++round) {
    for (int size = 0; size < kSizes; ++size) {
      mistral::cpu::parallel_for(4, kTasks[size], [size](int64_t task) { ++runs[size][task]; });
    }
  }
  for (int size = 0; size < kSizes; ++size) {
    for (int task = 0; task < kMost; ++task) {
      const int expected = task < kTasks[size] ? kRounds : 0;
      if (runs[size][task] != expected) {
        printf("task %d of %d ran %d times, expected %d\n", task, int(kTasks[size]),
               runs[size][task].load(), expected);
        return 1;
      }
    }
  }
}

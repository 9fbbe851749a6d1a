// Loops over independent tasks, which the threads of a pool share.
#pragma once

#include <cstdint>

namespace mistral::cpu {

// Calls run(context, i) once for every i in [0, tasks), and returns when all calls are done. Up to
// `threads` threads run tasks, and the caller is one of them. There are never more than four
// threads for each processor, or 16 if that is more. A thread takes one task at a time, in order,
// so that uneven tasks balance. A task should take a few microseconds or more. If the pool runs the
// loop of another caller, this caller runs all of its tasks alone. A task must not call
// parallel_for or parallel_ranges: its thread may hold the mutex that they try to lock.
void parallel_for(int threads, int64_t tasks, void (*run)(const void* context, int64_t task),
                  const void* context);

template <class F>
[[gnu::always_inline]] inline void parallel_for(int threads, int64_t tasks, const F& f) {
  parallel_for(
      threads, tasks,
      [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}

// Calls run(context, begin, end) for ranges that make up [0, count). The length of every range but
// the last is a multiple of `unit`. A thread that is free takes half of its equal share of what
// remains, but at least `least`, which is a positive multiple of `unit`. So ranges get shorter and
// shorter. The first ranges are long because each range is slow at its start, until its prefetches
// have arrived. The last ranges are short so that all threads end at about the same time.
void parallel_ranges(int threads, int64_t count, int64_t unit, int64_t least,
                     void (*run)(const void* context, int64_t begin, int64_t end),
                     const void* context);

template <class F>
[[gnu::always_inline]] inline void parallel_ranges(int threads, int64_t count, int64_t unit,
                                                   int64_t least, const F& f) {
  parallel_ranges(
      threads, count, unit, least,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      &f);
}

}  // namespace mistral::cpu

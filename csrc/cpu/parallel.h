// A loop over independent tasks, shared out among a pool of threads.
#pragma once

#include <cstdint>

namespace mistral::cpu {

// Calls run(context, i) once for every i in [0, tasks), on up to `threads` threads of which the
// caller is one, and returns when all are done. There are never more than four for each processor
// (or 16), whatever `threads` is. Tasks are handed out in order, one at a time, so uneven ones
// balance; make each worth a few microseconds. A call while another thread's is under way runs its
// tasks on its own thread.
void parallel_for(int threads, int64_t tasks, void (*run)(const void* context, int64_t task),
                  const void* context);

template <class F>
[[gnu::always_inline]] inline void parallel_for(int threads, int64_t tasks, const F& f) {
  parallel_for(
      threads, tasks,
      [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}

// Calls run(context, begin, end) for ranges that make up [0, count); all but the last are multiples
// of `unit`, as `least`, more than 0, has to be. Each time a thread takes half of its share of what
// is left, or `least`: long ranges first, because each begins slowly, and short ones at the end, so
// that all threads end together.
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

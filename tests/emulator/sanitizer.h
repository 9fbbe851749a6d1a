// AddressSanitizer has to be told about memory that no program may touch and about stacks that are
// not the thread's own. Without it, these do nothing.
#pragma once

#include <cstddef>

#ifdef EMULATOR_SANITIZE
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#ifdef EMULATOR_SANITIZE
constexpr bool kSanitized = true;

inline void forbid(const void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
inline void allow(const void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }

// Around a switch of stacks: before it, with the stack to come and a place to save the state of the
// one to leave (null: it is left for good); after it, on the new stack, with what had been saved.
inline void before_switch(void** saved, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(saved, bottom, size);
}
inline void after_switch(void* saved, const void** old_bottom, size_t* old_size) {
  __sanitizer_finish_switch_fiber(saved, old_bottom, old_size);
}
#else
constexpr bool kSanitized = false;

inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

}  // namespace emulator

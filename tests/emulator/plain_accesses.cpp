// Accesses of kernels that do not go through the functions of ptx.cuh: shared[i] = x,
// p.sequences[i]. Their code is compiled as for ThreadSanitizer (CMakeLists.txt), so before each
// access that may concern others it calls one of the functions below; they are here in the place of
// that sanitizer's own.
#include <cstddef>
#include <cstdint>

#include "block.h"

namespace {

void access(const void* address, size_t bytes, bool store) noexcept {
  emulator::Thread* const thread = emulator::current;
  if (!thread) return;  // a launch, on the host
  emulator::Block& block = *thread->block;
  const auto offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(block.shared().data());
  if (offset >= block.launch().shared_bytes) {
    if (thread->waited && !store) return;
    const auto below = reinterpret_cast<uintptr_t>(thread->stack.sp) -  // stacks grow down
                       reinterpret_cast<uintptr_t>(address);
    if (below <= thread->stack.size) return;
  }
  block.note_plain_access(address, bytes, store);
}

}  // namespace

extern "C" {

#define ACCESSES(bytes)                                                                        \
  void __tsan_read##bytes(void* address) { access(address, bytes, false); }                    \
  void __tsan_write##bytes(void* address) { access(address, bytes, true); }                    \
  void __tsan_unaligned_read##bytes(void* address) { access(address, bytes, false); }          \
  void __tsan_unaligned_write##bytes(void* address) { access(address, bytes, true); }          \
  void __tsan_volatile_read##bytes(void* address) { access(address, bytes, false); }           \
  void __tsan_volatile_write##bytes(void* address) { access(address, bytes, true); }           \
  void __tsan_unaligned_volatile_read##bytes(void* address) { access(address, bytes, false); } \
  void __tsan_unaligned_volatile_write##bytes(void* address) { access(address, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES

void __tsan_read_range(void* address, size_t bytes) { access(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { access(address, bytes, true); }

// The compiler's guard of a static variable.
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

// Of no interest here: calls, and pointers to virtual functions.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"

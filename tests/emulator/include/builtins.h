// The names that the CUDA language gives to kernels, for the host compiler. One may be added here
// when a kernel comes to need it.
#pragma once

#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "../error.h"

// The compiler's attributes: the headers define the others away, but not these.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

// Warp-wide instructions; `bits` and the results are values of at most 8 bytes.
uint64_t shuffle(Site site, unsigned mask, uint64_t bits, int source_lane);
unsigned ballot(Site site, unsigned mask, bool predicate);
void sync_warp(Site site, unsigned mask);
void sync_threads(Site site);
void thread_fence();
int lane();

// While it exists, no other thread of the process is in an atomic function of this launch. Throws
// unless the address is in global memory that may be written.
class AtomicOperation {
 public:
  AtomicOperation(Site site, const void* address, size_t bytes);

 private:
  std::lock_guard<std::mutex> lock_;
};

template <class T>
T shuffle_value(Site site, unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(site, mask, bits, source_lane);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The lane itself where `source` is outside its segment of `width` lanes.
inline int in_segment(int source, int width) {
  return source >= 0 && source / width == lane() / width ? source : lane();
}

}  // namespace emulator

inline void __syncthreads(emulator::Site site = emulator::Site::here()) {
  emulator::sync_threads(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, emulator::Site site = emulator::Site::here()) {
  emulator::sync_warp(site, mask);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = 32,
              emulator::Site site = emulator::Site::here()) {
  const int first = emulator::lane() / width * width;
  return emulator::shuffle_value(site, mask, value, first + source_lane % width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Site site = emulator::Site::here()) {
  const int source = emulator::lane() - static_cast<int>(delta);
  return emulator::shuffle_value(site, mask, value, emulator::in_segment(source, width));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::here()) {
  const int source = emulator::lane() + static_cast<int>(delta);
  return emulator::shuffle_value(site, mask, value, emulator::in_segment(source, width));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  emulator::Site site = emulator::Site::here()) {
  const int source = emulator::lane() ^ lanes;
  return emulator::shuffle_value(site, mask, value, emulator::in_segment(source, width));
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Site site = emulator::Site::here()) {
  return emulator::ballot(site, mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot(site, mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::ballot(site, mask, predicate == 0) == 0;
}

inline void __threadfence() { emulator::thread_fence(); }

template <class T>
T atomicAdd(T* address, T value, emulator::Site site = emulator::Site::here()) {
  const emulator::AtomicOperation operation(site, address, sizeof *address);
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T atomicMax(T* address, T value, emulator::Site site = emulator::Site::here()) {
  const emulator::AtomicOperation operation(site, address, sizeof *address);
  const T old = *address;
  if (old < value) *address = value;
  return old;
}

template <class T>
T atomicExch(T* address, T value, emulator::Site site = emulator::Site::here()) {
  const emulator::AtomicOperation operation(site, address, sizeof *address);
  const T old = *address;
  *address = value;
  return old;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

// Byte i of the result is the byte of (y, x) that nibble i of `selector` names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = M_PI * static_cast<double>(x);
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}

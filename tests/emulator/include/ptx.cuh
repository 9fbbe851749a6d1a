// Stand-in for csrc/cuda/common/ptx.cuh: the same functions, checked and counted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../instructions.h"
#include "builtins.h"

namespace mistral::cuda {

using emulator::Site;

inline uint4 ld_global_16(const void* global, Site site = Site::here()) {
  emulator::access_global(site, emulator::Access::global_load, global, 16);
  return *static_cast<const uint4*>(global);
}

inline void st_global_16(void* global, uint4 value, Site site = Site::here()) {
  emulator::access_global(site, emulator::Access::global_store, global, 16);
  *static_cast<uint4*>(global) = value;
}

template <class T>
T ld_global(const T* global, Site site = Site::here()) {
  emulator::access_global(site, emulator::Access::global_load, global, sizeof(T));
  return *global;
}

template <class T>
void st_global(T* global, T value, Site site = Site::here()) {
  emulator::access_global(site, emulator::Access::global_store, global, sizeof(T));
  *global = value;
}

inline uint4 ld_shared_16(const void* shared, Site site = Site::here()) {
  return emulator::load_shared<uint4>(site, shared);
}

inline uint2 ld_shared_8(const void* shared, Site site = Site::here()) {
  return emulator::load_shared<uint2>(site, shared);
}

inline void st_shared_16(void* shared, uint4 value, Site site = Site::here()) {
  emulator::store_shared(site, shared, value);
}

inline uint32_t shared_address(const void* shared) { return emulator::shared_offset(shared); }

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = Site::here()) {
  emulator::cp_async(site, shared, global, 16, valid ? 16 : 0);
}

inline void cp_async_4(void* shared, const void* global, int bytes, Site site = Site::here()) {
  emulator::cp_async(site, shared, global, 4, static_cast<size_t>(bytes));
}

inline void cp_async_commit() { emulator::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site = Site::here()) {
  emulator::ldmatrix_x4(site, r, shared_row, false);
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row,
                                   Site site = Site::here()) {
  emulator::ldmatrix_x4(site, r, shared_row, true);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::here()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::mma_m16n8k16(site, type, d, a, b);
}

inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t flip) { return (x & mask) ^ flip; }

inline void wait_for_earlier_kernels(Site site = Site::here()) {
  emulator::wait_for_earlier_kernels(site);
}

inline void let_later_kernels_begin(Site site = Site::here()) {
  emulator::let_later_kernels_begin(site);
}

inline float exp2_approx(float x) { return emulator::exp2_approx(x); }

}  // namespace mistral::cuda

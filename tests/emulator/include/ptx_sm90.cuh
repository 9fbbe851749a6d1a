// Stand-in for csrc/cuda/common/ptx_sm90.cuh: the same functions, checked and counted.
#pragma once

#include <cuda.h>
#include <ptx.cuh>

#include "../hopper.h"
#include "../tma.h"
#include "../wgmma.h"

namespace mistral::cuda {

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site site = Site::here()) {
  emulator::mbarrier_init(site, barrier, arrivals);
}

inline void mbarrier_init_fence(Site site = Site::here()) { emulator::mbarrier_init_fence(site); }

inline void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulator::mbarrier_arrive(site, barrier, 0);
}

inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::here()) {
  emulator::mbarrier_arrive(site, barrier, bytes);
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::here()) {
  emulator::mbarrier_wait(site, barrier, parity);
}

inline void cp_async_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulator::cp_async_arrive(site, barrier);
}

inline void fence_proxy_async(Site site = Site::here()) { emulator::fence_proxy_async(site); }

inline void tma_prefetch(const CUtensorMap* map, Site site = Site::here()) {
  emulator::tma_prefetch(site, map);
}

inline void tma_load_2d(void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t x,
                        int32_t y, Site site = Site::here()) {
  const int32_t coordinates[] = {x, y};
  emulator::tma_load(site, shared, map, barrier, coordinates, 2);
}

inline void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int32_t x,
                        int32_t y, int32_t z, Site site = Site::here()) {
  const int32_t coordinates[] = {x, y, z};
  emulator::tma_load(site, shared, map, barrier, coordinates, 3);
}

inline void wgmma_fence(Site site = Site::here()) { emulator::wgmma_fence(site); }

inline void wgmma_commit(Site site = Site::here()) { emulator::wgmma_commit(site); }

template <int kPending>
void wgmma_wait(Site site = Site::here()) {
  emulator::wgmma_wait(site, kPending);
}

template <int kCount>
void wgmma_settle(float (&d)[kCount], Site site = Site::here()) {
  emulator::wgmma_settle(site, d, kCount);
}
template <int kCount>
void wgmma_settle(uint32_t (&a)[kCount][4], Site site = Site::here()) {
  for (const auto& registers : a) emulator::wgmma_settle(site, registers);
}

inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                 Site site = Site::here()) {
  return emulator::wgmma_descriptor(site, shared, leading_bytes, stride_bytes);
}

template <class T, int N, bool kTransposeB>
void wgmma_m64(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate,
               Site site = Site::here()) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::wgmma(site, {type, N, kTransposeB, d, nullptr, a, b, accumulate});
}

template <class T, int N, bool kTransposeB>
void wgmma_m64(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
               Site site = Site::here()) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr auto type = std::is_same_v<T, __half> ? emulator::Half::f16 : emulator::Half::bf16;
  emulator::wgmma(site, {type, N, kTransposeB, d, a, 0, b, accumulate});
}

template <int kRegisters>
void registers_increase(Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::registers_increase(site, kRegisters);
}

template <int kRegisters>
void registers_decrease(Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::registers_decrease(site, kRegisters);
}

inline void named_barrier_sync(int id, int threads, Site site = Site::here()) {
  emulator::named_barrier_sync(site, id, threads);
}

inline void named_barrier_arrive(int id, int threads, Site site = Site::here()) {
  emulator::named_barrier_arrive(site, id, threads);
}

}  // namespace mistral::cuda

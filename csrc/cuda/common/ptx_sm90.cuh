// One small function for each instruction of sm_90 and sm_90a that kernels use: barriers in shared
// memory, the copy engine (TMA), matrix products by a warpgroup (wgmma), and the registers of a
// warpgroup. Section 9.7 of the manual of the PTX ISA describes these instructions. A file may
// include this header only if it is compiled for sm_90a alone. The emulator replaces this header,
// like ptx.cuh.
#pragma once

#include <cuda.h>
#include <ptx.cuh>

#include <type_traits>

namespace mistral::cuda {

// ---- Barriers in shared memory (mbarrier). A barrier has 8 bytes and is 8-byte aligned. It goes
// through phases. A phase is complete when all expected arrivals and all expected bytes have come.
// Then the next phase begins at once.

// Sets the number of arrivals that complete a phase. Arrivals by cp_async_arrive count, too.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals,
                                              Site = Site::here()) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes the barriers that this thread has initialised visible to the copy engine. Other threads see
// them after a __syncthreads.
__device__ __forceinline__ void mbarrier_init_fence(Site = Site::here()) {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives. A thread that has waited for the phase sees what this thread wrote before its arrival.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, Site = Site::here()) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives. The phase also waits for `bytes` bytes, which tma_load_2d or tma_load_3d brings.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes,
                                                       Site = Site::here()) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. The first phase has parity 0, the second 1, the
// third 0, and so on. During the first phase, a wait for parity 1 returns at once. This helps a
// thread that fills a buffer, and before that waits until others have emptied it. If it begins with
// parity 1, it does not wait for a buffer that has never been filled.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity,
                                              Site = Site::here()) {
  uint32_t complete;
  do {  // try_wait may give up before the phase is complete
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!complete);
}

// Arrives once all earlier copies of this thread with cp_async_16 and cp_async_4 are complete. The
// thread itself does not wait.
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier, Site = Site::here()) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// ---- Proxies. wgmma and TMA access shared memory through the async proxy. Loads, stores and
// cp.async use the generic proxy.

// Needed before wgmma or TMA reads what stores or cp.async have written. Orders the generic
// accesses that this thread has made, or has seen complete, before later accesses of wgmma and TMA.
// One of two threads calls it:
//   - the thread that writes, after its stores or its finished copies, before the barrier;
//   - the thread that starts wgmma or TMA, after the barrier. Copies that end in cp_async_arrive
//     need this, because the writing thread does not wait for them.
__device__ __forceinline__ void fence_proxy_async(Site = Site::here()) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA copies boxes of a tensor to shared memory. A map describes the tensor and the size of
// the box (tensor_map_sm90.h). The map must be a kernel parameter that is const __grid_constant__.
// One thread starts a copy.

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, Site = Site::here()) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts a copy of the box that begins at element x of row y. Elements outside the tensor become
// zeros. `shared` must be a multiple of 1024, because the swizzle depends on the bits of the
// address. The arriving bytes, zeros included, count for the current phase of `barrier`.
__device__ __forceinline__ void tma_load_2d(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int32_t x, int32_t y, Site = Site::here()) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                            int32_t x, int32_t y, int32_t z, Site = Site::here()) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// ---- wgmma: products by a warpgroup. A warpgroup is 4 neighbouring warps, and the index of its
// first warp is a multiple of 4. All threads of the warpgroup make these calls together. The
// products are asynchronous. Until wgmma_wait returns, no code may touch the registers of d and a,
// or overwrite the operands in shared memory.

// Must be called after any access to the registers of d or a, before the products that use these
// registers.
__device__ __forceinline__ void wgmma_fence(Site = Site::here()) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Makes one group of the products since the last commit.
__device__ __forceinline__ void wgmma_commit(Site = Site::here()) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all groups are complete, except the `kPending` groups that were committed last.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(Site = Site::here()) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Emits no instruction, but keeps the compiler from moving uses of d across this call. The compiler
// believes that d is ready as soon as wgmma_m64 is issued, so it could move a use of d before the
// wait. Call this for each d after the wait and before d is used. If other code has set d, call
// this also before the wgmma_fence of the products that add to d.
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount], Site = Site::here()) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Does the same for an operand a in registers. Call this before the wgmma_fence of its products.
// Otherwise the compiler could compute a after the fence.
template <int kCount>
__device__ __forceinline__ void wgmma_settle(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Returns the descriptor with which wgmma finds a matrix of 16-bit elements in shared memory. The
// matrix has the 128-byte swizzle: its rows have 128 bytes, and 16-byte piece i of row r lies at
// place (i ^ r) % 8. An atom is 8 rows, or 1024 bytes, and begins at a multiple of 1024. `shared`
// must lie in row 0 of an atom. M and N are the axes of the product, K is the axis that it sums
// over. There are two layouts:
//   K-major: a row has 64 elements along K. `stride_bytes` is the distance from 8 rows to the next
//   8 rows. `leading_bytes` has no meaning. A product takes 16 elements along K, and those of the
//   next product begin 32 bytes further.
//   MN-major: a row has 64 elements along M or N, and the next row is the next index along K.
//   `stride_bytes` is the distance from 8 rows to the next 8 rows. `leading_bytes` is the distance
//   from 64 elements along M or N to the next 64.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                                     uint32_t stride_bytes, Site = Site::here()) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride_bytes >> 4} << 32 | uint64_t{leading_bytes >> 4} << 16 |
         (shared_address(shared) & 0x3ffff) >> 4;
}

// The first operands of the asm statements are the registers of d. MISTRAL_D8(i) and MISTRAL_D32(i)
// list 8 or 32 of them, from d[i] on. MISTRAL_NAMES_32 and _64 are the names of 32 or 64 operands.
#define MISTRAL_D8(i)                                                                   \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), \
      "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define MISTRAL_D32(i) \
  MISTRAL_D8(i), MISTRAL_D8((i) + 8), MISTRAL_D8((i) + 16), MISTRAL_D8((i) + 24)
#define MISTRAL_NAMES_32                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, " \
  "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MISTRAL_NAMES_64                                                               \
  MISTRAL_NAMES_32                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The text of the instruction. `accumulate` names an operand that is 0 or 1. `last` holds the
// instruction's last arguments, a flag for each operand in shared memory: 1 if it is MN-major.
#define MISTRAL_WGMMA(shape, type, d, a, b, accumulate, last)                       \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " accumulate                  \
  ", 0;\n"                                                                          \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" d "}, " a ", " b \
  ", accumulate, 1, 1, " last ";\n}"

// d = a * b or, if `accumulate`, d += a * b. `a` and `b` are descriptors of operands in shared
// memory. a is stored as [64, 16], K-major. b is stored as [N, 16], K-major, or with kTransposeB as
// [16, N], MN-major. Warp w of the warpgroup has rows 16 * w to 16 * w + 15 of d [64, N]. In a
// lane, d[4 * j] to d[4 * j + 3] belong to columns 8 * j to 8 * j + 7, in the layout of d in
// mma_m16n8k16.
template <class T, int N, bool kTransposeB>
__device__ __forceinline__ void wgmma_m64(float (&d)[N / 2], uint64_t a, uint64_t b,
                                          bool accumulate, Site = Site::here()) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (N == 64 && std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(MISTRAL_WGMMA("m64n64k16", "bf16", MISTRAL_NAMES_32, "%32", "%33", "%34", "0, %35")
                 : MISTRAL_D32(0)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeB));
  } else if constexpr (N == 64) {
    asm volatile(MISTRAL_WGMMA("m64n64k16", "f16", MISTRAL_NAMES_32, "%32", "%33", "%34", "0, %35")
                 : MISTRAL_D32(0)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeB));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        MISTRAL_WGMMA("m64n128k16", "bf16", MISTRAL_NAMES_64, "%64", "%65", "%66", "0, %67")
        : MISTRAL_D32(0), MISTRAL_D32(32)
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeB));
  } else {
    asm volatile(MISTRAL_WGMMA("m64n128k16", "f16", MISTRAL_NAMES_64, "%64", "%65", "%66", "0, %67")
                 : MISTRAL_D32(0), MISTRAL_D32(32)
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeB));
  }
}

// The same product with a in registers. Warp w holds rows 16 * w to 16 * w + 15 of a, in the layout
// of a in mma_m16n8k16.
template <class T, int N, bool kTransposeB>
__device__ __forceinline__ void wgmma_m64(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                          bool accumulate, Site = Site::here()) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (N == 64 && std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(MISTRAL_WGMMA("m64n64k16", "bf16", MISTRAL_NAMES_32, "{%32, %33, %34, %35}", "%36",
                               "%37", "%38")
                 : MISTRAL_D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),
                   "n"(kTransposeB));
  } else if constexpr (N == 64) {
    asm volatile(MISTRAL_WGMMA("m64n64k16", "f16", MISTRAL_NAMES_32, "{%32, %33, %34, %35}", "%36",
                               "%37", "%38")
                 : MISTRAL_D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),
                   "n"(kTransposeB));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(MISTRAL_WGMMA("m64n128k16", "bf16", MISTRAL_NAMES_64, "{%64, %65, %66, %67}",
                               "%68", "%69", "%70")
                 : MISTRAL_D32(0), MISTRAL_D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),
                   "n"(kTransposeB));
  } else {
    asm volatile(MISTRAL_WGMMA("m64n128k16", "f16", MISTRAL_NAMES_64, "{%64, %65, %66, %67}", "%68",
                               "%69", "%70")
                 : MISTRAL_D32(0), MISTRAL_D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),
                   "n"(kTransposeB));
  }
}

#undef MISTRAL_WGMMA
#undef MISTRAL_NAMES_64
#undef MISTRAL_NAMES_32
#undef MISTRAL_D32
#undef MISTRAL_D8

// ---- Redistribution of registers among the warpgroups of a block. A warpgroup that only loads
// gives up registers, so that a warpgroup that computes can have more. All threads of the warpgroup
// make the call together. A kernel with __launch_bounds__(threads, 1) starts with the registers of
// the multiprocessor divided equally among its threads. kRegisters is the number of registers per
// thread after the call, a multiple of 8.

// Waits until other warpgroups have given up enough registers.
template <int kRegisters>
__device__ __forceinline__ void registers_increase(Site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_decrease(Site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- The named barriers of a block. `id` is 1 to 15, because __syncthreads uses barrier 0. Some
// or all warps of the block take part. `threads` is the number of threads that take part, 32 for
// each warp.

__device__ __forceinline__ void named_barrier_sync(int id, int threads, Site = Site::here()) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting for other threads.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads, Site = Site::here()) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace mistral::cuda

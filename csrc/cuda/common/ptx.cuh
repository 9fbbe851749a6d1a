// One small function for each machine instruction that kernels use. C++ cannot express most of
// these instructions. Section 9.7 of the manual of the PTX ISA describes them. The emulator
// replaces this file, as runtime.cuh explains.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mistral::cuda {

// The place in the source from which memory is accessed. On a device the struct is empty. In the
// emulator it is a file and a line. The emulator names them in error messages, and counts all
// accesses of a warp from one place as one request.
struct Site {
  __device__ static constexpr Site here() { return {}; }
};

// ---- Memory. Addresses must be multiples of the size of the access.

__device__ __forceinline__ uint4 ld_global_16(const void* global, Site = Site::here()) {
  // This is asm because a pointer that is chosen among several may not be known to the compiler as
  // global. The compiler would then emit a generic load.
  uint4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(global))
               : "memory");
  return value;
}

__device__ __forceinline__ void st_global_16(void* global, uint4 value, Site = Site::here()) {
  // This is asm because the compiler may turn a plain assignment into four stores.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

template <class T>
__device__ __forceinline__ T ld_global(const T* global, Site = Site::here()) {
  return *global;
}

template <class T>
__device__ __forceinline__ void st_global(T* global, T value, Site = Site::here()) {
  *global = value;
}

__device__ __forceinline__ uint4 ld_shared_16(const void* shared, Site = Site::here()) {
  return *static_cast<const uint4*>(shared);
}

__device__ __forceinline__ uint2 ld_shared_8(const void* shared, Site = Site::here()) {
  return *static_cast<const uint2*>(shared);
}

__device__ __forceinline__ void st_shared_16(void* shared, uint4 value, Site = Site::here()) {
  *static_cast<uint4*>(shared) = value;
}

// Converts an address to the form that the shared-memory instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Asynchronous copies from global to shared memory.

// Starts a copy of 16 bytes that bypasses the L1 cache. If `valid` is false, it reads nothing and
// writes zeros. This thread may read the result after its cp_async_wait. Other threads may read the
// result after a barrier that follows this wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid,
                                            Site = Site::here()) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Starts a copy of 4 bytes. It goes through the L1 cache, because only copies of 16 bytes can
// bypass it. It reads only the first `bytes` bytes, and writes zeros for the others.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, int bytes,
                                           Site = Site::here()) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// Makes one group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups of this thread are complete, except the `kPending` groups that were
// committed last.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrices. All lanes of a warp make these calls together. A lane holds two neighbouring
// elements (a pair) of each 8x8 matrix. They are in row lane / 4, and the first of them is in
// column 2 * (lane % 4).

// Loads four 8x8 matrices of 16-bit elements. Lane i gives the address of a row of 16 bytes: row
// i % 8 of matrix i / 8. r[j] becomes this lane's pair of matrix j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                                            Site = Site::here()) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ldmatrix_x4 that transposes each matrix: stored rows become columns.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row,
                                                       Site = Site::here()) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a * b, where a is [16, 16], b [16, 8] and d [16, 8]. Each register of a and b holds the
// lane's pair of one 8x8 matrix. a[0] to a[3] are the quarters of a: top left, bottom left, top
// right, bottom right. b[0] and b[1] are the transposed upper and lower half of b. d[0] and d[1]
// are the lane's pair of the upper half of d, d[2] and d[3] that of the lower half.
template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Overlap of kernels (launch_overlapping), from capability 9.0 on. In code for older devices
// these functions do nothing.

// Waits until all kernels before this kernel are done and their results can be read.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel to begin when every block of this kernel has made this call or is done.
__device__ __forceinline__ void let_later_kernels_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Arithmetic.

// (x & mask) ^ flip. This is asm because the compiler emits two instructions instead of one if mask
// and flip are constants.
__device__ __forceinline__ uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t flip) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(flip));
  return result;
}

// 2^x, with an error of at most 2 units in the last place. Subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace mistral::cuda

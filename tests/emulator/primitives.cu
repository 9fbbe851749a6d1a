// One kernel per primitive: it moves fragments between memory and registers element by element, as
// the tables of the PTX ISA give them, so that a test can compare with plain torch.
#include <launch.cuh>
#include <ptx.cuh>

#include "../../csrc/cuda/common/vec.cuh"
#include "test_kernels.h"

namespace mistral::cuda {
namespace {

constexpr unsigned kAll = 0xffffffff;

// in: [32, 6 + 4] words: a lane's registers of A, B and C; out: [32, 4] floats of D.
template <class T>
__global__ void mma(const uint32_t* in, float* out) {
  const uint32_t* mine = in + 10 * threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = ld_global(mine + i);
  for (int i = 0; i < 2; ++i) b[i] = ld_global(mine + 4 + i);
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(ld_global(mine + 6 + i));
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) st_global(out + 4 * threadIdx.x + i, d[i]);
}

// in: [4, 8, 8] of 16 bits, a row for each lane; out: [32, 4] words.
template <bool kTransposed>
__global__ void ldmatrix(const uint16_t* in, uint32_t* out) {
  auto* shared = dynamic_shared<uint16_t>();
  st_shared_16(shared + 8 * threadIdx.x, ld_global_16(in + 8 * threadIdx.x));
  __syncwarp();
  uint32_t r[4];
  if (kTransposed) {
    ldmatrix_x4_transposed(r, shared + 8 * threadIdx.x);
  } else {
    ldmatrix_x4(r, shared + 8 * threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) st_global(out + 4 * threadIdx.x + i, r[i]);
}

// in: int [32]; out: int [6, 32].
__global__ void shuffles(const int* in, int* out) {
  const int lane = threadIdx.x, value = ld_global(in + lane);
  const int results[] = {
      __shfl_sync(kAll, value, 5),
      __shfl_sync(kAll, value, lane + 1, 8),
      __shfl_up_sync(kAll, value, 3),
      __shfl_down_sync(kAll, value, 2, 16),
      __shfl_xor_sync(kAll, value, 9),
      // two halves that go ways of their own
      lane < 16 ? __shfl_xor_sync(0x0000ffff, value, 1) : __shfl_xor_sync(0xffff0000, value, 2),
  };
  for (int i = 0; i < 6; ++i) st_global(out + 32 * i + lane, results[i]);
}

// in: int [32], out: int [3, 32].
__global__ void votes(const int* in, int* out) {
  const int lane = threadIdx.x, predicate = ld_global(in + lane);
  const int results[] = {int(__ballot_sync(kAll, predicate)), __any_sync(kAll, predicate),
                         __all_sync(kAll, predicate)};
  for (int i = 0; i < 3; ++i) st_global(out + 32 * i + lane, results[i]);
}

// Copies n of 32 vectors of 16 bytes; the others are to be zeros.
__global__ void cp_async(const uint8_t* in, uint8_t* out, int64_t n) {
  const int lane = threadIdx.x;
  auto* shared = dynamic_shared<uint8_t>();
  // From past the end where it is not valid: nothing may be read from there.
  cp_async_16(shared + 16 * lane, in + 16 * (lane < n ? lane : lane + 1000), lane < n);
  cp_async_commit();
  cp_async_wait<0>();
  st_global_16(out + 16 * lane, ld_shared_16(shared + 16 * lane));
}

// Copies n bytes by words of 4, of which the last may be a part; the others are to be zeros.
__global__ void cp_async_words(const uint8_t* in, uint32_t* out, int64_t n) {
  const int lane = threadIdx.x, left = int(n) - 4 * lane;
  auto* shared = dynamic_shared<uint32_t>();
  cp_async_4(shared + lane, in + 4 * lane, left < 0 ? 0 : left > 4 ? 4 : left);
  cp_async_commit();
  cp_async_wait<0>();
  st_global(out + lane, shared[lane]);
}

// Only lane n loads first what all load then.
__global__ void one_lane_more(const float* in, float* out, int64_t n) {
  const int lane = threadIdx.x;
  float sum = lane == n ? ld_global(in + lane) : 0.0f;
  for (int i = 0; i < 2; ++i) sum += ld_global(in + lane);
  st_global(out + lane, sum);
}

// out: int [2, 32]: words of in [32] with their bytes turned round, and and_xor.
__global__ void bits(const uint32_t* in, uint32_t* out) {
  const uint32_t x = ld_global(in + threadIdx.x);
  st_global(out + threadIdx.x, __byte_perm(x, 0u, 0x0123));
  st_global(out + 32 + threadIdx.x, and_xor(x, 0x00ff00ffu, 0x12345678u));
}

// Each thread copies its share of n tiles [blockDim] of 16 bytes, two under way at a time.
__global__ void pipeline(const uint8_t* in, uint8_t* out, int64_t n) {
  const size_t tile = 16 * blockDim.x, mine = 16 * threadIdx.x;
  auto* shared = dynamic_shared<uint8_t>() + mine;
  for (int64_t i = 0; i < 2; ++i) {
    cp_async_16(shared + i * tile, in + i * tile + mine, i < n);
    cp_async_commit();
  }
  for (int64_t i = 0; i < n; ++i) {
    cp_async_wait<1>();
    st_global_16(out + i * tile + mine, ld_shared_16(shared + i % 2 * tile));
    cp_async_16(shared + i % 2 * tile, in + (i + 2) * tile + mine, i + 2 < n);
    cp_async_commit();
  }
}

// Blocks add to out[0] and the last to come writes how many came before it to out[1].
__global__ void atomics(int* out, float* sum) {
  atomicAdd(sum, 0.5f);
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  const int before = atomicAdd(out, 1);
  if (before == int(gridDim.x) - 1) st_global(out + 1, before);
}

// out: int [blocks, threads, 6], what each thread sees of itself.
__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  const unsigned values[] = {blockIdx.x,  blockIdx.y,  blockIdx.z,
                             threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) st_global(mine + i, int(values[i]));
}

// Lane i copies float i * n.
__global__ void strided_copy(const float* in, float* out, int64_t n) {
  st_global(out + threadIdx.x * n, ld_global(in + threadIdx.x * n));
}

// Lane i reads the 16 or 8 bytes at n * i of shared memory.
__global__ void shared_stride(float* out, int64_t n) {
  const uint4 v = ld_shared_16(dynamic_shared<uint8_t>() + threadIdx.x * n);
  st_global(out + threadIdx.x, __uint_as_float(v.x));
}
__global__ void shared_stride_8(float* out, int64_t n) {
  const uint2 v = ld_shared_8(dynamic_shared<uint8_t>() + threadIdx.x * n);
  st_global(out + threadIdx.x, __uint_as_float(v.x));
}

__global__ void uninitialised(float* out) {
  st_global(out + threadIdx.x, dynamic_shared<float>()[threadIdx.x]);
}

__global__ void nothing() {}

__device__ int events;  // where the emulator does not watch

__global__ void order_of_overlap(int* out, bool let_first) {
  const int start = events++;
  if (let_first) let_later_kernels_begin();
  wait_for_earlier_kernels();
  const int waited = events++;
  if (!let_first) let_later_kernels_begin();
  const int end = events++;
  int* const of_block = out + 3 * blockIdx.x;
  st_global(of_block, start);
  st_global(of_block + 1, waited);
  st_global(of_block + 2, end);
}

}  // namespace

cudaError_t run_mma_bf16(const Arguments& a) {
  return launch(mma<__nv_bfloat16>, 1, 32, 0, nullptr, static_cast<const uint32_t*>(a.in),
                static_cast<float*>(a.out));
}

cudaError_t run_mma_f16(const Arguments& a) {
  return launch(mma<__half>, 1, 32, 0, nullptr, static_cast<const uint32_t*>(a.in),
                static_cast<float*>(a.out));
}

cudaError_t run_ldmatrix(const Arguments& a) {
  return launch(ldmatrix<false>, 1, 32, 512, nullptr, static_cast<const uint16_t*>(a.in),
                static_cast<uint32_t*>(a.out));
}

cudaError_t run_ldmatrix_transposed(const Arguments& a) {
  return launch(ldmatrix<true>, 1, 32, 512, nullptr, static_cast<const uint16_t*>(a.in),
                static_cast<uint32_t*>(a.out));
}

cudaError_t run_shuffles(const Arguments& a) {
  return launch(shuffles, 1, 32, 0, nullptr, static_cast<const int*>(a.in),
                static_cast<int*>(a.out));
}

cudaError_t run_votes(const Arguments& a) {
  return launch(votes, 1, 32, 0, nullptr, static_cast<const int*>(a.in), static_cast<int*>(a.out));
}

cudaError_t run_cp_async(const Arguments& a) {
  return launch(cp_async, 1, 32, 512, nullptr, static_cast<const uint8_t*>(a.in),
                static_cast<uint8_t*>(a.out), a.n);
}

cudaError_t run_cp_async_words(const Arguments& a) {
  return launch(cp_async_words, 1, 32, 128, nullptr, static_cast<const uint8_t*>(a.in),
                static_cast<uint32_t*>(a.out), a.n);
}

cudaError_t run_one_lane_more(const Arguments& a) {
  return launch(one_lane_more, 1, 32, 0, nullptr, static_cast<const float*>(a.in),
                static_cast<float*>(a.out), a.n);
}

cudaError_t run_bits(const Arguments& a) {
  return launch(bits, 1, 32, 0, nullptr, static_cast<const uint32_t*>(a.in),
                static_cast<uint32_t*>(a.out));
}

cudaError_t run_pipeline(const Arguments& a) {
  return launch(pipeline, 1, 64, 2 * 64 * 16, nullptr, static_cast<const uint8_t*>(a.in),
                static_cast<uint8_t*>(a.out), a.n);
}

cudaError_t run_atomics(const Arguments& a) {  // out: int [2] and a float
  auto* out = static_cast<int*>(a.out);
  return launch(atomics, dim3(unsigned(a.n)), 70, 0, nullptr, out,
                reinterpret_cast<float*>(out + 2));
}

cudaError_t run_indices(const Arguments& a) {
  return launch(indices, dim3(3, 2, 2), dim3(5, 4, 2), 0, nullptr, static_cast<int*>(a.out));
}

cudaError_t run_strided_copy(const Arguments& a) {
  return launch(strided_copy, 1, 32, 0, nullptr, static_cast<const float*>(a.in),
                static_cast<float*>(a.out), a.n);
}

cudaError_t run_shared_stride(const Arguments& a) {
  return launch(shared_stride, 1, 32, 31 * a.n + 16, nullptr, static_cast<float*>(a.out), a.n);
}

cudaError_t run_shared_stride_8(const Arguments& a) {
  return launch(shared_stride_8, 1, 32, 31 * a.n + 8, nullptr, static_cast<float*>(a.out), a.n);
}

cudaError_t run_uninitialised(const Arguments& a) {
  return launch(uninitialised, 1, 32, 128, nullptr, static_cast<float*>(a.out));
}

// Three launches of three blocks. out: int [3, 3, 3]: how many events of all came before a block's
// start, the end of its wait, and its end. n = 1: it lets later kernels begin before it waits.
cudaError_t run_order_of_overlap(const Arguments& a) {
  events = 0;
  for (int i = 0; i < 3; ++i) {
    const cudaError_t status = launch_overlapping(order_of_overlap, 3, 1, 0, nullptr,
                                                  static_cast<int*>(a.out) + 9 * i, a.n == 1);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// A launch of n threads, n / 8 KiB of shared memory and n blocks: returns what CUDA says of it.
cudaError_t run_shape(const Arguments& a) {
  return launch(nothing, dim3(unsigned(a.n)), dim3(unsigned(a.n)), size_t(a.n) * 128, nullptr);
}

}  // namespace mistral::cuda

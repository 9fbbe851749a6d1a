// The primitives of ptx_sm90.cuh, one kernel for each, as primitives.cu has those of ptx.cuh.
#include <launch.cuh>
#include <ptx_sm90.cuh>

#include "../../csrc/cuda/attention/tensor_map_sm90.h"
#include "test_kernels.h"

namespace mistral::cuda {
namespace {

constexpr int kWarpgroup = 128;

// ---- TMA

constexpr int kBox2[] = {64, 16}, kBox3[] = {64, 2, 4};
constexpr size_t kBox2Bytes = 2 * 64 * 16, kBox3Bytes = 2 * 64 * 2 * 4;

// Copies a box to out as it lies in shared memory.
template <int kRank>
__global__ void tma(const __grid_constant__ CUtensorMap map, uint8_t* out, int x, int y, int z) {
  constexpr int kBytes = kRank == 2 ? kBox2Bytes : kBox3Bytes;
  auto* shared = dynamic_shared<uint8_t>();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kBytes);
  if (threadIdx.x == 0) {
    tma_prefetch(&map);
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, kBytes);
    if (kRank == 2) {
      tma_load_2d(shared, &map, barrier, x, y);
    } else {
      tma_load_3d(shared, &map, barrier, x, y, z);
    }
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = 16 * threadIdx.x; i < kBytes; i += 16 * 32) {
    st_global_16(out + i, ld_shared_16(shared + i));
  }
}

// ---- wgmma

// in: the descriptors of a and b, as they are with both matrices at the beginning of shared memory,
// then kImage bytes for it, then [64, 16] elements of a for those with a in registers. Out: d, 2 n
// floats for each warp's lane, that is [128, n / 2].
constexpr int kImage = 64 * 1024;

template <class T, int N, bool kTransposeB, bool kRegisters>
__global__ void wgmma(const uint8_t* in, float* out) {
  auto* shared = dynamic_shared<uint8_t>();
  const int thread = threadIdx.x, row = thread / 4 % 8 + thread / 32 * 16, column = thread % 4 * 2;
  for (int i = 16 * thread; i < kImage; i += 16 * kWarpgroup) {
    st_shared_16(shared + i, ld_global_16(in + 16 + i));
  }
  fence_proxy_async();
  __syncthreads();
  const auto* descriptors = reinterpret_cast<const uint64_t*>(in);
  const uint64_t base = shared_address(shared) >> 4;
  const uint64_t a = ld_global(descriptors) + base, b = ld_global(descriptors + 1) + base;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = float(i);
  if constexpr (kRegisters) {
    uint32_t registers[1][4];
    for (int i = 0; i < 4; ++i) {
      const int at = (row + i % 2 * 8) * 16 + column + i / 2 * 8;
      registers[0][i] = ld_global(reinterpret_cast<const uint32_t*>(in + 16 + kImage + 2 * at));
    }
    wgmma_settle(registers);
    wgmma_fence();
    wgmma_m64<T, N, kTransposeB>(d, registers[0], b, false);
    wgmma_m64<T, N, kTransposeB>(d, registers[0], b, true);
    wgmma_commit();
    wgmma_wait<0>();
  } else {
    wgmma_fence();
    wgmma_m64<T, N, kTransposeB>(d, a, b, false);
    wgmma_m64<T, N, kTransposeB>(d, a, b, true);
    wgmma_commit();
    wgmma_wait<0>();
  }
  wgmma_settle(d);
  for (int i = 0; i < N / 2; ++i) st_global(out + thread * (N / 2) + i, d[i]);
}

template <class T, int N, bool kTransposeB>
cudaError_t run_wgmma(const Arguments& a) {
  const auto kernel =
      a.n >> 3 & 1 ? wgmma<T, N, kTransposeB, true> : wgmma<T, N, kTransposeB, false>;
  return launch(kernel, 1, kWarpgroup, kImage, nullptr, static_cast<const uint8_t*>(a.in),
                static_cast<float*>(a.out));
}

template <class T, int N>
cudaError_t run_wgmma(const Arguments& a) {
  return a.n >> 2 & 1 ? run_wgmma<T, N, true>(a) : run_wgmma<T, N, false>(a);
}

template <class T>
cudaError_t run_wgmma(const Arguments& a) {
  return a.n >> 1 & 1 ? run_wgmma<T, 128>(a) : run_wgmma<T, 64>(a);
}

// Two groups under way, of which the first is waited for alone. in: none; out: [2, 128].
__global__ void wgmma_groups(float* out) {
  auto* shared = dynamic_shared<__half>();
  const uint4 ones = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
  for (int i = 8 * threadIdx.x; i < 64 * 64; i += 8 * kWarpgroup) st_shared_16(shared + i, ones);
  fence_proxy_async();
  __syncthreads();
  const uint64_t matrix = wgmma_descriptor(shared, 0, 1024);
  float d[2][32];
  wgmma_fence();
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k <= i; ++k) wgmma_m64<__half, 64, false>(d[i], matrix, matrix, k > 0);
    wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_settle(d[0]);
  st_global(out + threadIdx.x, d[0][31]);
  wgmma_wait<0>();
  wgmma_settle(d[1]);
  st_global(out + kWarpgroup + threadIdx.x, d[1][31]);
}

// ---- Barriers

// Warp 0 hands n values of each lane, one after another, to warp 1, which doubles them.
__global__ void mbarrier(const float* in, float* out, int64_t n) {
  auto* values = dynamic_shared<float>();
  auto* full = reinterpret_cast<uint64_t*>(values + 32);
  uint64_t* empty = full + 1;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
  }
  __syncthreads();
  for (uint32_t i = 0; i < n; ++i) {
    if (threadIdx.x < 32) {
      mbarrier_wait(empty, (i + 1) % 2);
      values[lane] = ld_global(in + 32 * i + lane);
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, i % 2);
      st_global(out + 32 * i + (lane ^ 1), 2 * values[lane ^ 1]);
      mbarrier_arrive(empty);
    }
  }
}

// Warp 0 copies 16 bytes a lane, warp 1 learns of it from a barrier.
__global__ void cp_async_barrier(const uint8_t* in, uint8_t* out) {
  auto* shared = dynamic_shared<uint8_t>();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + 512);
  const int other = 16 * (31 - threadIdx.x % 32), own = 16 * threadIdx.x;
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    cp_async_16(shared + own, in + own, true);
    cp_async_arrive(barrier);
  } else {
    mbarrier_wait(barrier, 0);
    st_global_16(out + other, ld_shared_16(shared + other));
  }
}

// Warps 0 and 1 write, one after the other; warp 2 reads what each has written.
__global__ void named_barriers(const float* in, float* out) {
  auto* shared = dynamic_shared<float>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, other = lane ^ 1;
  const float value = ld_global(in + lane);
  if (warp == 2) {
    named_barrier_sync(3, 96);
    st_global(out + other, shared[other]);
    return;
  }
  if (warp == 0) {
    shared[lane] = value;
    named_barrier_arrive(1, 64);
    named_barrier_arrive(3, 96);
  } else {
    named_barrier_sync(1, 64);
    shared[other] += value;
    named_barrier_arrive(3, 96);
  }
}

// Of 3 warpgroups with 168 registers the first gives up 112 for the others, twice. Out: [384].
__global__ void registers(float* out) {
  if (threadIdx.x < kWarpgroup) {
    registers_decrease<56>();
  } else {
    registers_increase<224>();
  }
  st_global(out + threadIdx.x, 1.0f);
}

// What must not be done, in the ways that n counts. By 160 threads: a warpgroup and a warp.
__global__ void misuse(const __grid_constant__ CUtensorMap map, float* out, int64_t n) {
  auto* shared = dynamic_shared<uint8_t>();
  auto* barrier = reinterpret_cast<uint64_t*>(shared + 8192);
  const int thread = threadIdx.x;
  const bool of_warpgroup = thread < kWarpgroup;
  const uint64_t matrix = wgmma_descriptor(shared, 0, 1024);
  if (thread == 0) {
    if (n != 0) mbarrier_init(barrier, n == 1 ? 0 : 1);
    mbarrier_init_fence();
    switch (n) {
      case 0: mbarrier_arrive(barrier); break;
      case 2: mbarrier_init(barrier, 1); break;
      case 3: mbarrier_arrive(barrier + 1); break;
      case 4:
        *barrier = 0;
        mbarrier_arrive(barrier);
        break;
      case 5: mbarrier_arrive(reinterpret_cast<uint64_t*>(shared + 8196)); break;
      case 6:
        mbarrier_arrive_expect(barrier, 16);
        mbarrier_arrive(barrier);
        break;
      case 7: mbarrier_arrive_expect(barrier, 1 << 20); break;
      case 8: mbarrier_wait(barrier, 2); break;
      case 9: mbarrier_arrive_expect(barrier, 16); break;
      case 10: tma_load_2d(shared + 512, &map, barrier, 0, 0); break;
      case 11: tma_load_3d(shared, &map, barrier, 0, 0, 0); break;
      case 12: tma_load_2d(shared + 7168, &map, barrier, 0, 0); break;
      case 13:
        tma_load_2d(shared, &map, barrier, 0, 0);
        tma_load_2d(shared + 1024, &map, barrier, 0, 0);
        break;
      case 14:
        st_shared_16(shared, {});
        tma_load_2d(shared, &map, barrier, 0, 0);
        break;
      case 15:
        tma_load_2d(shared, &map, barrier, 0, 0);
        st_shared_16(shared, {});
        break;
      case 16: tma_load_2d(shared, reinterpret_cast<CUtensorMap*>(shared), barrier, 0, 0); break;
      case 17: wgmma_descriptor(shared, 0, 1000); break;
    }
  }
  float d[32] = {};
  switch (n) {
    case 20: named_barrier_sync(0, 160); break;
    case 21: named_barrier_sync(16, 160); break;
    case 22: named_barrier_sync(1, 150); break;
    case 23: named_barrier_sync(1, 192); break;
    case 24: named_barrier_sync(1 + thread % 2, 160); break;
    case 26: registers_decrease<64>(); break;
    case 27:
      if (of_warpgroup) registers_increase<24>();
      break;
    case 28:
      if (of_warpgroup) registers_decrease<64>();
      if (of_warpgroup) registers_decrease<128>();
      break;
    case 29: wgmma_fence(); break;
    case 30:
      if (of_warpgroup && thread % 2) wgmma_fence();
      break;
    case 31:
      if (of_warpgroup) {
        if (thread < 32) wgmma_fence();
        if (thread >= 32) wgmma_commit();
      }
      break;
    case 32:
      if (of_warpgroup) {
        wgmma_settle(d);
        wgmma_fence();
        wgmma_m64<__half, 64, false>(d, matrix + thread / 32, matrix, true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settle(d);
      }
      break;
    case 33:
      if (of_warpgroup) {
        wgmma_fence();
        wgmma_m64<__half, 64, false>(d, matrix, matrix, thread % 2 > 0);
      }
      break;
    case 34:
      if (of_warpgroup) {
        wgmma_settle(d);
        wgmma_fence();
        wgmma_m64<__half, 64, false>(d, matrix, matrix, true);
        wgmma_wait<0>();  // of no group: it has not been committed
      }
      break;
    case 35:
    case 36:
    case 37:
      if (of_warpgroup) {
        for (int i = 35; i <= n; ++i) {
          wgmma_fence();
          wgmma_m64<__half, 64, false>(d, matrix, matrix, false);
          wgmma_commit();
          if (n == 37) wgmma_settle(d);
          wgmma_wait<0>();
        }
      }
      break;
  }
  st_global(out + thread, d[0]);
}

}  // namespace

cudaError_t run_tma_2d(const Arguments& a) {  // in: 16 bits [20, 104] of which 100; n: y * 1000 + x
  TensorMapShape shape{2, {100, 20}, {0, 208}, {kBox2[0], kBox2[1]}};
  CUtensorMap map;
  const cudaError_t status = make_tensor_map(&map, a.in, shape);
  if (status != cudaSuccess) return status;
  const auto x = static_cast<int>(a.n % 1000) - 200, y = static_cast<int>(a.n / 1000) - 200;
  return launch(tma<2>, 1, 32, kBox2Bytes + 8, nullptr, map, static_cast<uint8_t*>(a.out), x, y, 0);
}

cudaError_t run_tma_3d(
    const Arguments& a) {  // in: 16 bits [7, 5, 72]; n: (z * 1000 + y) * 1000 + x
  TensorMapShape shape{3, {72, 5, 7}, {0, 144, 720}, {kBox3[0], kBox3[1], kBox3[2]}};
  CUtensorMap map;
  const cudaError_t status = make_tensor_map(&map, a.in, shape);
  if (status != cudaSuccess) return status;
  const auto x = static_cast<int>(a.n % 1000) - 200, y = static_cast<int>(a.n / 1000 % 1000) - 200,
             z = static_cast<int>(a.n / 1000000) - 200;
  return launch(tma<3>, 1, 32, kBox3Bytes + 8, nullptr, map, static_cast<uint8_t*>(a.out), x, y, z);
}

// in: int64 rank, sizes[5], stride_bytes[5], box[5]; n is added to the address. Launches nothing.
cudaError_t run_tensor_map(const Arguments& a) {
  const auto* numbers = static_cast<const int64_t*>(a.in);
  TensorMapShape shape{static_cast<int>(numbers[0]), {}, {}, {}};
  for (int i = 0; i < 5; ++i) {
    shape.sizes[i] = static_cast<uint64_t>(numbers[1 + i]);
    shape.stride_bytes[i] = static_cast<uint64_t>(numbers[6 + i]);
    shape.box[i] = static_cast<uint32_t>(numbers[11 + i]);
  }
  CUtensorMap map;
  return make_tensor_map(&map, static_cast<const char*>(a.in) + a.n, shape);
}

// n: 1 for fp16, 2 for N = 128, 4 for an MN-major b, 8 for a in registers, added up.
cudaError_t run_wgmma(const Arguments& a) {
  return a.n & 1 ? run_wgmma<__half>(a) : run_wgmma<__nv_bfloat16>(a);
}

cudaError_t run_wgmma_groups(const Arguments& a) {
  return launch(wgmma_groups, 1, kWarpgroup, 8192, nullptr, static_cast<float*>(a.out));
}

cudaError_t run_mbarrier(const Arguments& a) {
  return launch(mbarrier, 1, 64, 144, nullptr, static_cast<const float*>(a.in),
                static_cast<float*>(a.out), a.n);
}

cudaError_t run_cp_async_barrier(const Arguments& a) {
  return launch(cp_async_barrier, 1, 64, 520, nullptr, static_cast<const uint8_t*>(a.in),
                static_cast<uint8_t*>(a.out));
}

cudaError_t run_named_barriers(const Arguments& a) {
  return launch(named_barriers, 1, 96, 128, nullptr, static_cast<const float*>(a.in),
                static_cast<float*>(a.out));
}

cudaError_t run_misuse(const Arguments& a) {  // in: 16 bits [16, 64]
  const TensorMapShape shape{2, {64, 16}, {0, 128}, {kBox2[0], kBox2[1]}};
  CUtensorMap map;
  const cudaError_t status = make_tensor_map(&map, a.in, shape);
  if (status != cudaSuccess) return status;
  return launch(misuse, 1, kWarpgroup + 32, 8192 + 16, nullptr, map, static_cast<float*>(a.out),
                a.n);
}

cudaError_t run_registers(const Arguments& a) {
  return launch(registers, 1, 3 * kWarpgroup, 0, nullptr, static_cast<float*>(a.out));
}

}  // namespace mistral::cuda

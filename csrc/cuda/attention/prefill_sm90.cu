// Launches the prefill kernel for sm_90a (prefill_sm90.cuh). This file is compiled for sm_90a
// alone.
#include "prefill_sm90.h"

#include <launch.cuh>

#include "multiply_sm90.cuh"
#include "tensor_map_sm90.h"

namespace mistral::cuda {
namespace {

template <class T, int D>
__global__ __launch_bounds__(kHopperThreads, 1) void attention_prefill_hopper(
    const __grid_constant__ AttentionParams p, const __grid_constant__ HopperMaps maps) {
  auto& shared = *dynamic_shared<HopperShared<T, D>>();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.k_pool, &maps.v_pool, &maps.k, &maps.v}) tma_prefetch(map);
    init_barriers(shared);
  }
  __syncthreads();
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    registers_decrease<kProducerRegisters>();
    produce(p, maps, shared);
  } else {
    registers_increase<kConsumerRegisters>();
    Consumer<T, D>(p, shared, warpgroup - 1).run();
  }
}

cudaError_t map_pool(CUtensorMap* map, const AttentionParams& p, const void* pool) {
  TensorMapShape shape{};
  shape.rank = 2;
  shape.sizes[0] = p.head_dim;
  shape.sizes[1] = p.pool_rows;
  shape.stride_bytes[1] = 2 * p.head_dim;
  shape.box[0] = 64;
  shape.box[1] = kHopperKeys;
  return make_tensor_map(map, pool, shape);
}

cudaError_t map_chunk(CUtensorMap* map, const AttentionParams& p, const void* chunk,
                      int64_t stride_token, int64_t stride_head) {
  TensorMapShape shape{};
  shape.rank = 3;
  shape.sizes[0] = p.head_dim;
  shape.sizes[1] = p.kv_heads;
  shape.sizes[2] = p.tokens;
  // If an axis has size 1, its stride may be any number. But a tensor map needs a multiple of 16
  // bytes, so head_dim stands in.
  shape.stride_bytes[1] = 2 * (p.kv_heads > 1 ? stride_head : p.head_dim);
  shape.stride_bytes[2] = 2 * (p.tokens > 1 ? stride_token : p.head_dim);
  shape.box[0] = 64;
  shape.box[1] = 1;
  shape.box[2] = kHopperKeys;
  return make_tensor_map(map, chunk, shape);
}

template <class T, int D>
cudaError_t launch_prefill(const AttentionParams& p, const HopperMaps& maps, cudaStream_t stream) {
  const int64_t blocks = min(multiprocessors(), prefill_tiles(p) * p.kv_heads * p.prefill_splits);
  return launch(attention_prefill_hopper<T, D>, dim3(static_cast<unsigned>(blocks)),
                dim3(kHopperThreads), sizeof(HopperShared<T, D>), stream, p, maps);
}

template <class T>
cudaError_t launch_prefill(const AttentionParams& p, const HopperMaps& maps, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_prefill<T, 64>(p, maps, stream)
                          : launch_prefill<T, 128>(p, maps, stream);
}

}  // namespace

cudaError_t attention_hopper(const AttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  HopperMaps maps;
  const cudaError_t made[] = {
      map_pool(&maps.k_pool, p, p.k_pool),
      map_pool(&maps.v_pool, p, p.v_pool),
      map_chunk(&maps.k, p, p.k, p.stride_k_token, p.stride_k_head),
      map_chunk(&maps.v, p, p.v, p.stride_v_token, p.stride_v_head),
  };
  for (const cudaError_t status : made) {
    if (status != cudaSuccess) return status;
  }
  return p.dtype == DType::bf16 ? launch_prefill<__nv_bfloat16>(p, maps, stream)
                                : launch_prefill<__half>(p, maps, stream);
}

}  // namespace mistral::cuda

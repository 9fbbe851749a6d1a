// Chooses between the kernels and launches them.
#include "../attention.h"

#include <launch.cuh>

#include "attention_decode.cuh"
#include "attention_prefill.cuh"
#include "element.cuh"

namespace mistral::cuda {
namespace {

template <class T, int D>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  const int64_t group = p.heads / p.kv_heads;
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  if (group <= kDecodeRows) {
    const dim3 grid(static_cast<unsigned>(p.splits), kv_heads,
                    static_cast<unsigned>(p.num_sequences));
    const cudaError_t status = launch(attention_decode<T, D>, grid, dim3(kDecodeWarps * kWarp),
                                      kDecodeShared<T, D>, stream, p);
    if (status != cudaSuccess || is_decode(p.max_count, group)) return status;
  }
  const auto tiles = static_cast<unsigned>(p.tokens * group / kPrefillRows + p.num_sequences);
  return launch(attention_prefill<T, D>, dim3(tiles, kv_heads), dim3(kPrefillWarps * kWarp),
                kPrefillShared<T, D>, stream, p);
}

template <class T>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_attention<T, 64>(p, stream);
    case 128: return launch_attention<T, 128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

AttentionScratch attention_scratch(int64_t sequences, int64_t kv_heads, int64_t head_dim,
                                   int64_t longest) {
  // Two blocks for each multiprocessor, as long as a block has a few tiles for each of its warps.
  const int64_t blocks = sequences * kv_heads;
  const int64_t wanted = ceil_div(2 * multiprocessors(), max(blocks, 1));
  const int64_t sensible = ceil_div(longest, 2 * kDecodeWarps * kDecodeKeys);
  AttentionScratch scratch;
  scratch.splits = static_cast<int32_t>(max(min(wanted, sensible), 1));
  scratch.counters = blocks;
  // kPartialRow
  scratch.partials =
      scratch.splits == 1 ? 0 : blocks * scratch.splits * kDecodeRows * (head_dim + 4);
  return scratch;
}

cudaError_t attention(const AttentionParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::bf16: return launch_attention<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_attention<__half>(p, stream);
    case DType::f32: return cudaErrorInvalidValue;  // has no tensor core product of this precision
  }
  return cudaErrorInvalidValue;
}

}  // namespace mistral::cuda

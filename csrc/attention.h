// Causal sliding-window grouped-query attention of a ragged batch over ring caches.
//
// Each query attends to the history in its sequence's ring and to its own chunk's keys up to
// itself, W keys at most (ring.h), with softmax(scale * q k^T) v accumulated online in fp32
// (Milakov and Gimelshein 2018, arXiv:1805.02867). Then the chunk's remaining tokens are
// appended to the rings: see `stored_after_attention`.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "ring.h"

namespace mistral {

struct AttentionParams {
  DType dtype;
  const void* q;              // [T, Hq, D], rotated
  const void* k;              // [T, Hkv, D], rotated
  const void* v;              // [T, Hkv, D]
  void* k_pool;               // [R, D]
  void* v_pool;               // [R, D]
  void* out;                  // [T, Hq, D]
  const Sequence* sequences;  // [S]
  int64_t num_sequences;      // S
  int64_t pool_rows;          // R
  int64_t tokens;             // T
  int64_t heads;              // Hq
  int64_t kv_heads;           // Hkv
  int64_t head_dim;           // D
  int64_t stride_q_token, stride_q_head;
  int64_t stride_k_token, stride_k_head;
  int64_t stride_v_token, stride_v_head;
  int64_t stride_out_token, stride_out_head;
  int64_t window;  // W or kNoWindow
  float scale;     // usually 1 / sqrt(D)
  // Scratch for the results of parts of the keys. CPU: attention_scratch_bytes(p). CUDA: of decodes
  // [S, Hkv, splits, 16, D + 4], then of tiles of prefill [Hkv * tiles * 2, prefill_splits, 64,
  // D + 4] in the same place, or null with one split of each.
  float* partials;

  // CUDA only
  int64_t max_count;  // no sequence has more new tokens than this; T if nothing better is known
  int32_t splits;     // blocks among which the keys of a decode are divided
  int32_t prefill_splits;  // those of a tile of prefill, for the kernel of sm_90a
  int32_t* counters;  // scratch: zeros, and left zeros. The first [S, Hkv] are for late tokens.
};

namespace cpu {
int64_t attention_scratch_bytes(const AttentionParams& p);
void attention(const AttentionParams& p, int threads);
}  // namespace cpu

namespace cuda {
// Of those that `is_head_dim` allows.
constexpr bool attention_takes_head_dim(int64_t dim) { return dim == 64 || dim == 128; }
}  // namespace cuda

#ifdef MISTRAL_CUDA
namespace cuda {
struct AttentionScratch {
  int32_t splits, prefill_splits;
  int64_t partials;  // floats
  int64_t counters;  // ints
};
// What `attention` needs for p, all of which but the scratch is set, and for sequences that see at
// most `longest` keys.
AttentionScratch attention_scratch(const AttentionParams& p, int64_t longest);

// bf16 and fp16, few head dimensions; every row of 16-byte aligned q, k and v.
cudaError_t attention(const AttentionParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

// Causal sliding-window grouped-query attention of a ragged batch over ring caches.
//
// Each query attends to at most W keys (ring.h): the history in the ring of its sequence, and the
// keys of its own chunk up to itself. softmax(scale * q k^T) v is accumulated online in fp32
// (Milakov and Gimelshein 2018, arXiv:1805.02867). Then the tokens of the chunk that had to wait
// for attention are appended to the rings: see `stored_after_attention`.
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
  float* lse;                 // [T, Hq], log(sum(exp(scores))) of each row; null: not wanted.
                              // Only for sequences that begin at position 0. With it the
                              // kernel of sm_90a is not used
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
  // Scratch for partial results, each of which covers a part of the keys. CPU:
  // attention_scratch_bytes(p). CUDA: null if the keys of no decode and of no tile of prefill are
  // divided. Otherwise decodes use [S, Hkv, splits, 16, D + 4], and prefill then reuses the memory
  // as [Hkv * tiles * 2, prefill_splits, 64, D + 4].
  float* partials;

  // CUDA only.
  int64_t max_count;  // no sequence has more new tokens than this; T if nothing better is known
  int32_t splits;     // blocks among which the keys of a decode are divided
  int32_t prefill_splits;  // the same for a tile of prefill, in the kernel of sm_90a
  int32_t* counters;  // scratch, zero before and after. The first [S, Hkv] are for late tokens.
};

namespace cpu {
int64_t attention_scratch_bytes(const AttentionParams& p);
void attention(const AttentionParams& p, int threads);
}  // namespace cpu

namespace cuda {
// A subset of what `is_head_dim` allows.
constexpr bool attention_takes_head_dim(int64_t dim) { return dim == 64 || dim == 128; }
}  // namespace cuda

#ifdef MISTRAL_CUDA
namespace cuda {
struct AttentionScratch {
  int32_t splits, prefill_splits;
  int64_t partials;  // floats
  int64_t counters;  // ints
};
// The scratch that `attention` needs for p if no sequence sees more than `longest` keys. Every
// field of p must be set except those for scratch.
AttentionScratch attention_scratch(const AttentionParams& p, int64_t longest);

// Takes bf16 and fp16, and the head dimensions of attention_takes_head_dim. Every row of q, k and v
// must be 16-byte aligned.
cudaError_t attention(const AttentionParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

// Causal sliding-window grouped-query attention of a ragged batch. The keys and values of earlier
// tokens lie in ring caches.
//
// Each query attends to at most W keys: the earlier tokens in the ring of its sequence, and the
// tokens of its own chunk up to the query itself (ring.h). The kernels accumulate softmax(scale * q
// k^T) v online in fp32 (Milakov and Gimelshein 2018, arXiv:1805.02867). Afterwards they append to
// the rings the tokens of the chunk that could not be appended earlier: see
// `stored_after_attention`.
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
  float* lse;                 // [T, Hq], log(sum(exp(scores))) of each row, or null. May be set
                              // only if all sequences begin at position 0. The kernel for
                              // sm_90a does not write it, so another kernel is chosen
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
  // Scratch for partial results, each of which covers a part of the keys. On the CPU it has
  // attention_scratch_bytes(p) bytes. On CUDA devices, decodes use it as [S, Hkv, splits, 16, D +
  // 4]. Prefill then reuses the memory as [Hkv * tiles * 2, prefill_splits, 64, D + 4]. It is not
  // used if neither decodes nor prefill divide their keys.
  float* partials;

  // CUDA only.
  int64_t max_count;       // an upper bound of the new tokens of a sequence; T if unknown
  int32_t splits;          // the number of blocks that share the keys of a decode
  int32_t prefill_splits;  // the most blocks that share the keys of a tile, in prefill for sm_90a
  // Scratch, zero before and after a call. The first [S, Hkv] count the blocks (in prefill for
  // sm_90a the warpgroups) that are done with a sequence and a key/value head. The last of them
  // merges the splits of a decode, and appends the late tokens (cuda/attention/finish.cuh). Prefill
  // for sm_90a has more counters behind these (cuda/attention/prefill_sm90.h).
  int32_t* counters;
};

namespace cpu {
int64_t attention_scratch_bytes(const AttentionParams& p);
void attention(const AttentionParams& p, int threads);
}  // namespace cpu

namespace cuda {
// Whether the CUDA kernels support a head dimension. They support some of those that `is_head_dim`
// allows.
constexpr bool attention_takes_head_dim(int64_t dim) { return dim == 64 || dim == 128; }
}  // namespace cuda

#ifdef MISTRAL_CUDA
namespace cuda {
struct AttentionScratch {
  int32_t splits, prefill_splits;
  int64_t partials;  // the number of floats
  int64_t counters;  // the number of ints
};
// The scratch that `attention` needs for p if no sequence sees more than `longest` keys. The caller
// has set the fields of p that AttentionScratch does not have.
AttentionScratch attention_scratch(const AttentionParams& p, int64_t longest);

// Takes bf16 and fp16, and the head dimensions of attention_takes_head_dim. Every row of q, k and v
// must be 16-byte aligned.
cudaError_t attention(const AttentionParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

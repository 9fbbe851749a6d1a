// Causal sliding-window grouped-query attention of a ragged batch, in which each sequence has its
// own number of new tokens. The new tokens of a sequence are its chunk. The keys and values of
// earlier tokens lie in ring caches (ring.h).
//
// A query attends to at most W keys. Some are in the ring of its sequence. The others belong to its
// own chunk, up to the query itself. The kernels accumulate softmax(scale * q k^T) v online in fp32
// (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// Before attention, `rope` has appended the tokens for which `stored_before_attention` (ring.h)
// holds: no query of the chunk reads what they replace. At its end, attention appends the tokens
// for which `stored_after_attention` holds.
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
  float* lse;                 // [T, Hq], receives log(sum(exp(scaled scores))) of each token and
                              // head; null: not wanted. It is for attention_backward.h, so all
                              // sequences must begin at position 0 if it is set. The kernel for
                              // sm_90a cannot write it, so a call with lse uses that for sm_80
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
  // Scratch for results of query rows over a part of their keys, which are merged later. On CUDA
  // devices such a result has D + 4 floats (kPartialRow in cuda/attention/merge.cuh).
  //   CPU: attention_scratch_bytes(p) bytes
  //   CUDA, decode with splits > 1: [S, Hkv, splits, 16, D + 4]. A decode has at most 16 query rows
  //     for each sequence and key/value head.
  //   CUDA, prefill for sm_90a with prefill_splits > 1: [Hkv * tiles * 2, prefill_splits, 64,
  //     D + 4]. `tiles` is prefill_tiles(p) (cuda/attention/rows.cuh). A tile has two times 64
  //     query rows. Decode is done when prefill begins, so both use the same memory.
  float* partials;

  // CUDA only.
  int64_t max_count;       // no sequence has more new tokens than this; T if unknown
  int32_t splits;          // the number of thread blocks that share the keys of a decode
  int32_t prefill_splits;  // for sm_90a: the most parts into which prefill divides a tile's keys
  // Scratch, zero before and after a call. The first S * Hkv counters are for the sequences and
  // their key/value heads. Each counts the thread blocks (in prefill for sm_90a: the warpgroups)
  // that are done with its head. The last to finish merges the splits of a decode, and stores the
  // tokens that had to wait for attention (cuda/attention/finish.cuh). The counters after these are
  // for prefill for sm_90a alone (cuda/attention/prefill_sm90.h).
  int32_t* counters;
};

namespace cpu {
int64_t attention_scratch_bytes(const AttentionParams& p);
void attention(const AttentionParams& p, int threads);
}  // namespace cpu

namespace cuda {
// Whether the CUDA kernels support a head dimension. The CPU kernels support more: all that
// `is_head_dim` (common.h) allows.
constexpr bool attention_takes_head_dim(int64_t dim) { return dim == 64 || dim == 128; }
}  // namespace cuda

#ifdef MISTRAL_CUDA
namespace cuda {
struct AttentionScratch {
  int32_t splits, prefill_splits;
  int64_t partials;  // the number of floats
  int64_t counters;  // the number of ints
};
// The scratch that `attention` needs for p if no sequence sees more than `longest` keys. It depends
// on the sizes in p, max_count and lse, so set these first. Then copy `splits` and `prefill_splits`
// to p.
AttentionScratch attention_scratch(const AttentionParams& p, int64_t longest);

// Takes bf16 and fp16, and the head dimensions of attention_takes_head_dim. Every row of q, k, v,
// out and the pools must be 16-byte aligned.
cudaError_t attention(const AttentionParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

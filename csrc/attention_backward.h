// The gradients of causal sliding-window grouped-query attention of a packed batch. All sequences
// begin at position 0, so k and v hold all keys and values, and no ring is read.
//
// A query has the scores s = scale * q k^T, the probabilities p = exp(s - lse), and the number
// delta = sum(d_out * out), a sum over D. Then:
//
//   d_v = p^T d_out      d_s = p * (d_out v^T - delta)      d_q = scale * d_s k
//                                                           d_k = scale * d_s^T q
//
// d_k and d_v are sums over the queries of all heads that share the key/value head. The kernels
// compute the scores again instead of storing them, so memory grows with T and not with T^2 (Dao et
// al. 2022, arXiv:2205.14135, appendix B).
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "ring.h"

namespace mistral {

struct AttentionBackwardParams {
  DType dtype;
  const void* q;              // [T, Hq, D], rotated
  const void* k;              // [T, Hkv, D], rotated
  const void* v;              // [T, Hkv, D]
  const void* out;            // [T, Hq, D], contiguous
  const void* d_out;          // [T, Hq, D], contiguous
  const float* lse;           // [T, Hq], written by attention (AttentionParams::lse)
  void* d_q;                  // [T, Hq, D], contiguous
  void* d_k;                  // [T, Hkv, D], contiguous
  void* d_v;                  // [T, Hkv, D], contiguous
  const Sequence* sequences;  // [S]; the fields for the ring and the position are ignored
  float* delta;               // [T, Hq], scratch of attention_backward_scratch_bytes(p) bytes
  int64_t num_sequences;      // S
  int64_t tokens;             // T
  int64_t heads;              // Hq
  int64_t kv_heads;           // Hkv
  int64_t head_dim;           // D
  int64_t stride_q_token, stride_q_head;
  int64_t stride_k_token, stride_k_head;
  int64_t stride_v_token, stride_v_head;
  int64_t window;  // W or kNoWindow
  float scale;     // usually 1 / sqrt(D)
};

inline int64_t attention_backward_scratch_bytes(const AttentionBackwardParams& p) {
  return p.tokens * p.heads * int64_t{sizeof(float)};
}

namespace cpu {
void attention_backward(const AttentionBackwardParams& p, int threads);
}  // namespace cpu

#ifdef MISTRAL_CUDA
namespace cuda {
// Takes bf16 and fp16, and the head dimensions of attention_takes_head_dim (attention.h). Every row
// of q, k, v, out, d_out, d_q, d_k and d_v must be 16-byte aligned. Repeated calls give the same
// bits.
cudaError_t attention_backward(const AttentionBackwardParams& p, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace mistral

// Causal sliding-window grouped-query attention of a ragged batch over ring caches.
//
// Each query attends to the history in its sequence's ring and to its own chunk's keys up to
// itself, W keys at most (ring.h), with softmax(scale * q k^T) v accumulated online in fp32
// (Milakov and Gimelshein 2018, arXiv:1805.02867). Then the chunk's remaining tokens are
// appended to the rings: see `stored_after_attention`.
#pragma once

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
};

namespace cpu {
void attention(const AttentionParams& p, int threads);
}

}  // namespace mistral

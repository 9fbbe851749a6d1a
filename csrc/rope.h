// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of q and k in place, and the
// append of k and v to the rings.
//
// Head elements i and i + D/2 form a pair (the order of Hugging Face checkpoints). A pair is
// rotated by the angle position * frequencies[i]. The frequency is theta^(-2i/D), or a rescaled
// value in models with a longer context. Frequencies are doubles because positions are unbounded:
// at position 10^6 an angle in float can already be off by 0.06 radians.
//
// rope appends only the tokens for which `stored_before_attention` (ring.h) holds. Attention
// appends those for which `stored_after_attention` holds.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "ring.h"

namespace mistral {

struct RopeParams {
  DType dtype;
  void* q;                    // [T, Hq, D]
  void* k;                    // [T, Hkv, D]
  const void* v;              // [T, Hkv, D]
  void* k_pool;               // [R, D]
  void* v_pool;               // [R, D]
  const Sequence* sequences;  // [S]
  const double* frequencies;  // [D/2], radians per position
  int64_t num_sequences;      // S
  int64_t tokens;             // T
  int64_t heads;              // Hq
  int64_t kv_heads;           // Hkv
  int64_t head_dim;           // D
  int64_t stride_q_token, stride_q_head;
  int64_t stride_k_token, stride_k_head;
  int64_t stride_v_token, stride_v_head;
  int64_t window;  // W or kNoWindow
};

namespace cpu {
void rope(const RopeParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t rope(const RopeParams& p, cudaStream_t stream);
}
#endif

}  // namespace mistral

// A task rotates all query and key heads of one token. It also stores the token's keys and values
// in the ring, but only if attention does not need the token that they replace
// (stored_before_attention in ring.h).
#include "../rope.h"

#include "append.h"
#include "kernels.h"
#include "parallel.h"
#include "rotation.h"

namespace mistral::cpu::MISTRAL_ISA {

void rope(const RopeParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens, [&](int64_t token) {
      const Sequence& s = p.sequences[find_sequence(p.sequences, p.num_sequences, token)];
      const int64_t position = s.position + token - s.first_token;
      const Rotation rotation(p.frequencies, p.head_dim, position);
      T* q = static_cast<T*>(p.q) + token * p.stride_q_token;
      for (int64_t head = 0; head < p.heads; ++head, q += p.stride_q_head) rotation.apply(q, q);
      T* k = static_cast<T*>(p.k) + token * p.stride_k_token;
      for (int64_t head = 0; head < p.kv_heads; ++head, k += p.stride_k_head) rotation.apply(k, k);
      if (stored_before_attention(s, position, p.window)) append<T>(p, s, token);
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

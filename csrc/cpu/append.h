// Copies the key and the value of each key/value head of one new token into the ring of its
// sequence. rope calls this for the tokens that it may store before attention (ring.h). attention
// calls it for the tokens that must be stored after attention.
#pragma once

#include <cstring>

#include "../ring.h"

namespace mistral::cpu::MISTRAL_ISA {

// Params is RopeParams or AttentionParams. The fields used here have the same names in both.
template <class T, class Params>
[[gnu::always_inline]] inline void append(const Params& p, const Sequence& s, int64_t token) {
  const int64_t position = s.position + token - s.first_token;
  const auto* k = static_cast<const T*>(p.k) + token * p.stride_k_token;
  const auto* v = static_cast<const T*>(p.v) + token * p.stride_v_token;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const int64_t offset = ring_row(s, head, position) * p.head_dim;
    const auto bytes = static_cast<size_t>(p.head_dim) * sizeof(T);
    memcpy(static_cast<T*>(p.k_pool) + offset, k + head * p.stride_k_head, bytes);
    memcpy(static_cast<T*>(p.v_pool) + offset, v + head * p.stride_v_head, bytes);
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

// A task rotates all heads of a token, and writes its keys and values to the ring.
#include "../rope.h"

#include "append.h"
#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

template <class T>
void rotate(T* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += Vec::width) {
    const Vec c = load(cosine + i), s = load(sine + i);
    const Vec a = load(x + i), b = load(x + half + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
}

}  // namespace

void rope(const RopeParams& p, int threads) {
  const int64_t half = p.head_dim / 2;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens, [&](int64_t token) {
      const Sequence& s = p.sequences[find_sequence(p.sequences, p.num_sequences, token)];
      const int64_t position = s.position + token - s.first_token;
      float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2];
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * p.frequencies[i];
        cosine[i] = static_cast<float>(cos(angle));
        sine[i] = static_cast<float>(sin(angle));
      }
      T* q = static_cast<T*>(p.q) + token * p.stride_q_token;
      for (int64_t head = 0; head < p.heads; ++head) {
        rotate(q + head * p.stride_q_head, cosine, sine, half);
      }
      T* k = static_cast<T*>(p.k) + token * p.stride_k_token;
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        rotate(k + head * p.stride_k_head, cosine, sine, half);
      }
      if (stored_before_attention(s, position, p.window)) append<T>(p, s, token);
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// RoPE for training (rotate.h). A task rotates all heads of one token.
#include "../rotate.h"

#include "kernels.h"
#include "parallel.h"
#include "rotation.h"

namespace mistral::cpu::MISTRAL_ISA {

void rotate(const RotateParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens, [&](int64_t token) {
      const Sequence& s = p.sequences[find_sequence(p.sequences, p.num_sequences, token)];
      const int64_t position = s.position + token - s.first_token;
      const Rotation rotation(p.frequencies, p.head_dim, p.backward ? -position : position);
      for (int64_t head = 0; head < p.heads; ++head) {
        const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token + head * p.stride_x_head;
        T* out = static_cast<T*>(p.out) + token * p.stride_out_token + head * p.stride_out_head;
        rotation.apply(x, out);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

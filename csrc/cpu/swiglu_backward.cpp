// A task computes the gradients of a block of one row.
#include "../swiglu.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kElementsPerTask = 8192;

struct Gradients {
  Vec gate, up;
};

MISTRAL_SIMD Gradients gradients(Vec gate, Vec up, Vec d_out) {
  const Vec one = broadcast(1.0f), sigmoid = one / (one + exp(broadcast(0.0f) - gate));
  const Vec silu = gate * sigmoid;
  // With s for sigmoid, the derivative of silu is s (1 + gate (1 - s)), which is s + silu (1 - s).
  return {d_out * up * fma(silu, one - sigmoid, sigmoid), d_out * silu};
}

}  // namespace

void swiglu_backward(const SwigluBackwardParams& p, int threads) {
  const int64_t blocks = ceil_div(p.dim, kElementsPerTask);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens * blocks, [&](int64_t task) {
      const int64_t token = task / blocks;
      const T* gate = static_cast<const T*>(p.gate) + token * p.stride_gate_token;
      const T* up = static_cast<const T*>(p.up) + token * p.stride_up_token;
      const T* d_out = static_cast<const T*>(p.d_out) + token * p.stride_d_out_token;
      T* d_gate = static_cast<T*>(p.d_gate) + token * p.stride_d_gate_token;
      T* d_up = static_cast<T*>(p.d_up) + token * p.stride_d_up_token;
      int64_t i = task % blocks * kElementsPerTask;
      const int64_t end = mistral::min(i + kElementsPerTask, p.dim);
      for (; i + Vec::width <= end; i += Vec::width) {
        const Gradients d = gradients(load(gate + i), load(up + i), load(d_out + i));
        store(d_gate + i, d.gate);
        store(d_up + i, d.up);
      }
      if (i < end) {
        const int64_t n = end - i;
        const Gradients d =
            gradients(load_first(gate + i, n), load_first(up + i, n), load_first(d_out + i, n));
        store_first(d_gate + i, d.gate, n);
        store_first(d_up + i, d.up, n);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

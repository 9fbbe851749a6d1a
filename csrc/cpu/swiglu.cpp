// A task computes a block of outputs of one row.
#include "../swiglu.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The most outputs of a task. A row of Mistral 7B (14336) fits one task, because waking a second
// thread would take longer than computing half of the row.
constexpr int64_t kElementsPerTask = 16384;

}  // namespace

void swiglu(const SwigluParams& p, int threads) {
  const int64_t blocks = ceil_div(p.dim, kElementsPerTask);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens * blocks, [&](int64_t task) {
      const int64_t token = task / blocks;
      const T* gate = static_cast<const T*>(p.gate) + token * p.stride_gate_token;
      const T* up = static_cast<const T*>(p.up) + token * p.stride_up_token;
      T* out = static_cast<T*>(p.out) + token * p.stride_out_token;
      int64_t i = task % blocks * kElementsPerTask;
      const int64_t end = mistral::min(i + kElementsPerTask, p.dim);
      for (; i + Vec::width <= end; i += Vec::width) {
        store(out + i, silu(load(gate + i)) * load(up + i));
      }
      if (i < end) {
        const int64_t n = end - i;
        store_first(out + i, silu(load_first(gate + i, n)) * load_first(up + i, n), n);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

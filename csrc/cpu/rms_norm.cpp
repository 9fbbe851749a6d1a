// A task normalises a block of rows.
#include "../rms_norm.h"

#include "kernels.h"
#include "norm.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kRowsPerTask = 4;

}  // namespace

void rms_norm(const RmsNormParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, ceil_div(p.tokens, kRowsPerTask), [&](int64_t task) {
      const int64_t end = mistral::min((task + 1) * kRowsPerTask, p.tokens);
      for (int64_t token = task * kRowsPerTask; token < end; ++token) {
        T* residual =
            p.residual ? static_cast<T*>(p.residual) + token * p.stride_residual_token : nullptr;
        normalise(static_cast<const T*>(p.x) + token * p.stride_x_token, residual,
                  static_cast<const T*>(p.weight),
                  static_cast<T*>(p.out) + token * p.stride_out_token, p.dim, p.eps);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

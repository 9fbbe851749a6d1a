// RoPE of one token, whose sines and cosines are computed once for all heads.
#pragma once

#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {

class Rotation {
 public:
  Rotation(const double* frequencies, int64_t head_dim, int64_t position) : half_(head_dim / 2) {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      cosine_[i] = static_cast<float>(cos(angle));
      sine_[i] = static_cast<float>(sin(angle));
    }
  }

  // Rotates one head, [D]. Elements i and i + D / 2 are rotated together. `out` may be `x`.
  template <class T>
  void apply(const T* x, T* out) const {
    for (int64_t i = 0; i < half_; i += Vec::width) {
      const Vec c = load(cosine_ + i), s = load(sine_ + i);
      const Vec a = load(x + i), b = load(x + half_ + i);
      store(out + i, a * c - b * s);
      store(out + half_ + i, b * c + a * s);
    }
  }

 private:
  int64_t half_;
  float cosine_[kMaxHeadDim / 2], sine_[kMaxHeadDim / 2];
};

}  // namespace mistral::cpu::MISTRAL_ISA

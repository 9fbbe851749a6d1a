// The part of simd.h for any processor: a vector of one float. avx512.h has the comments on its
// functions.
#pragma once

namespace mistral::cpu::MISTRAL_ISA {

struct Vec {
  static constexpr int width = 1;
  float v;
};

MISTRAL_SIMD Vec broadcast(float x) { return {x}; }
MISTRAL_SIMD Vec broadcast(f16 x) { return {to_float(x)}; }

template <class T>
MISTRAL_SIMD Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
MISTRAL_SIMD void store(T* p, Vec x) {
  from_float(x.v, p);
}

MISTRAL_SIMD Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
MISTRAL_SIMD Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
MISTRAL_SIMD Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
MISTRAL_SIMD Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
MISTRAL_SIMD Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

MISTRAL_SIMD float sum(Vec a) { return a.v; }
MISTRAL_SIMD float largest(Vec a) { return a.v; }
MISTRAL_SIMD void sum4(const Vec a[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = a[i].v;
}

struct Words {
  uint32_t v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  Words w;
  memcpy(&w.v, p, sizeof w.v);
  return w;
}
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  return {static_cast<float>(static_cast<int32_t>(w.v << (28 - int4_shift(i))) >> 28)};
}
MISTRAL_SIMD Words field(Words w, int shift, int mask) {
  return {w.v >> shift & static_cast<uint32_t>(mask)};
}
MISTRAL_SIMD Words join(Words a, Words b, int shift) { return {a.v | b.v << shift}; }
MISTRAL_SIMD Words flip_bit(Words w, int bit) { return {w.v ^ 1u << bit}; }
MISTRAL_SIMD Vec to_vec(Words w) { return {static_cast<float>(w.v)}; }
MISTRAL_SIMD Vec look_up(Words w) { return {kFloatTable4.values[w.v]}; }
struct GroupScales {
  using Loaded = const bf16*;

  GroupScales(int, int64_t) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return reinterpret_cast<const bf16*>(scales);
  }
  MISTRAL_SIMD Vec of_chunk(Loaded scales, int) const { return broadcast(to_float(scales[0])); }
};

}  // namespace mistral::cpu::MISTRAL_ISA

// The part of simd.h for aarch64: one vector of 4 floats. avx512.h has the comments on its
// functions. All aarch64 processors have NEON.
#pragma once

#include <arm_neon.h>

namespace mistral::cpu::MISTRAL_ISA {

struct Vec {
  static constexpr int width = 4;
  float32x4_t v;
};

MISTRAL_SIMD Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
MISTRAL_SIMD Vec broadcast(f16 x) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.bits)))};
}

MISTRAL_SIMD Vec load(const float* p) { return {vld1q_f32(p)}; }
MISTRAL_SIMD Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
}
MISTRAL_SIMD Vec load(const f16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
}
MISTRAL_SIMD Vec load(const int8_t* p) {
  uint32_t four;
  memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}

MISTRAL_SIMD void store(float* p, Vec x) { vst1q_f32(p, x.v); }
MISTRAL_SIMD void store(bf16* p, Vec x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t number = vceqq_f32(x.v, x.v);
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(number, rounded, quiet), 16));
}
MISTRAL_SIMD void store(f16* p, Vec x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

MISTRAL_SIMD Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
MISTRAL_SIMD Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
MISTRAL_SIMD Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
MISTRAL_SIMD Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
MISTRAL_SIMD Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// vmin and vmax return b if a or b is NaN, as on x86.
MISTRAL_SIMD Vec vmin(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
MISTRAL_SIMD Vec vmax(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
MISTRAL_SIMD Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
MISTRAL_SIMD Vec scale_by_power(Vec a, Vec n) {
  // 2^n is split into two factors, because it may itself be too small or too large for a normal
  // float.
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return {vmulq_f32(vmulq_f32(a.v, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second))};
}

MISTRAL_SIMD float sum(Vec a) { return vaddvq_f32(a.v); }
MISTRAL_SIMD float largest(Vec a) { return vmaxnmvq_f32(a.v); }
MISTRAL_SIMD void sum4(const Vec a[4], float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v)));
}

// 4 words of 32 bits. Each word holds 8 values of 4 bits (csrc/formats.h).
struct Words {
  uint32x4_t v;
};
MISTRAL_SIMD Words load_words(const void* p) {
  return {vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p)))};
}
MISTRAL_SIMD Vec int4_value(Words w, int i) {
  const int32x4_t high = vreinterpretq_s32_u32(w.v << (28 - int4_shift(i)));
  return {vcvtq_f32_s32(vshrq_n_s32(high, 28))};
}
MISTRAL_SIMD Words field(Words w, int shift, int mask) {
  return {vandq_u32(w.v >> shift, vdupq_n_u32(static_cast<uint32_t>(mask)))};
}
MISTRAL_SIMD Words join(Words a, Words b, int shift) { return {vorrq_u32(a.v, b.v << shift)}; }
MISTRAL_SIMD Words flip_bit(Words w, int bit) { return {veorq_u32(w.v, vdupq_n_u32(1u << bit))}; }
MISTRAL_SIMD Vec to_vec(Words w) { return {vcvtq_f32_u32(w.v)}; }
MISTRAL_SIMD Vec look_up(Words w) {
  // Only the lowest byte of each word is an index. The shifts drop what is found for the other
  // bytes.
  const int8x16_t found = vqtbl1q_s8(vld1q_s8(kTable4), vreinterpretq_u8_u32(w.v));
  const int32x4_t high = vshlq_n_s32(vreinterpretq_s32_s8(found), 24);
  return {vcvtq_f32_s32(vshrq_n_s32(high, 24))};
}
// The bf16 scales of vectors of words. A vector has 32 values, which always belong to one group, so
// all lanes have the same scale.
struct GroupScales {
  int group_log2;

  using Loaded = const bf16*;

  GroupScales(int group_log2, int64_t) : group_log2(group_log2) {}
  MISTRAL_SIMD Loaded load(const char* scales) const {
    return reinterpret_cast<const bf16*>(scales);
  }
  MISTRAL_SIMD Vec of_chunk(Loaded scales, int i) const {
    return broadcast(to_float(scales[i * 8 * Vec::width >> group_log2]));
  }
};

MISTRAL_SIMD void interleave(Vec a, Vec b, Vec out[2]) {
  out[0] = {vzip1q_f32(a.v, b.v)};
  out[1] = {vzip2q_f32(a.v, b.v)};
}
MISTRAL_SIMD Vec largest_of_quarter(Vec a) { return a; }

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

#define MISTRAL_BF16_PAIRS

// 4 pairs of bf16. One instruction adds the products of pairs to the 4 lanes of a Vec.
struct Pairs {
  bfloat16x8_t v;
};
MISTRAL_SIMD Pairs load_pairs(const bf16* p) {
  return {vreinterpretq_bf16_u16(vld1q_u16(&p->bits))};
}
MISTRAL_SIMD void store_pairs(bf16* p, Pairs x) {
  vst1q_u16(&p->bits, vreinterpretq_u16_bf16(x.v));
}
MISTRAL_SIMD Pairs broadcast_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof pair);
  return {vreinterpretq_bf16_u32(vdupq_n_u32(pair))};
}
MISTRAL_SIMD Vec dot(Pairs a, Pairs b, Vec c) { return {vbfdotq_f32(c.v, a.v, b.v)}; }
MISTRAL_SIMD Pairs to_pairs(Vec first, Vec second) {
  return {vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first.v), second.v)};
}
MISTRAL_SIMD void interleave(Pairs a, Pairs b, Pairs out[2]) {
  const uint32x4_t left = vreinterpretq_u32_bf16(a.v), right = vreinterpretq_u32_bf16(b.v);
  out[0] = {vreinterpretq_bf16_u32(vzip1q_u32(left, right))};
  out[1] = {vreinterpretq_bf16_u32(vzip2q_u32(left, right))};
}
MISTRAL_SIMD void pair_up(Pairs a, Pairs b, Pairs out[2]) {
  const uint16x8_t left = vreinterpretq_u16_bf16(a.v), right = vreinterpretq_u16_bf16(b.v);
  out[0] = {vreinterpretq_bf16_u16(vzip1q_u16(left, right))};
  out[1] = {vreinterpretq_bf16_u16(vzip2q_u16(left, right))};
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

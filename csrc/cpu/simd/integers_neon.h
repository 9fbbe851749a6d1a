// The part of integers.h for aarch64.
#pragma once

#include "simd.h"

namespace mistral::cpu::MISTRAL_ISA {

struct Shorts {  // integers of 16 bits
  static constexpr int64_t width = 8;
  int16x8_t v;
};
struct Ints {  // 4 integers of 32 bits
  int32x4_t v;
};

MISTRAL_SIMD Shorts load_shorts(const int16_t* p) { return {vld1q_s16(p)}; }
MISTRAL_SIMD Shorts broadcast_short(int16_t x) { return {vdupq_n_s16(x)}; }
MISTRAL_SIMD Shorts widen_bytes(const char* p) {
  return {vmovl_s8(vld1_s8(reinterpret_cast<const int8_t*>(p)))};
}
// Turns values of 4 bits from two's complement into unsigned values that are 8 larger.
MISTRAL_SIMD Words flip_int4_signs(Words w) { return {veorq_u32(w.v, vdupq_n_u32(0x88888888))}; }
// Values 2 i and 2 i + 1 of each word. After a shift by 4 i they are the lowest bits of its halves
// (int4_shift in csrc/formats.h), which become lanes.
MISTRAL_SIMD Shorts int4_shorts(Words w, int i) {
  const uint16x8_t values = vandq_u16(vreinterpretq_u16_u32(w.v >> 4 * i), vdupq_n_u16(15));
  return {vreinterpretq_s16_u16(values)};
}

MISTRAL_SIMD Ints load_ints(const int16_t* p) { return {vreinterpretq_s32_s16(vld1q_s16(p))}; }
MISTRAL_SIMD void store_ints(int16_t* p, Ints x) { vst1q_s16(p, vreinterpretq_s16_s32(x.v)); }
MISTRAL_SIMD Ints broadcast_int(int32_t x) { return {vdupq_n_s32(x)}; }
MISTRAL_SIMD Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.v, b.v)}; }
MISTRAL_SIMD Vec to_vec(Ints x) { return {vcvtq_f32_s32(x.v)}; }
// Adds a[i] * b[i] + a[i + 4] * b[i + 4] to lane i. On x86 a lane gets another pair. This makes no
// difference, because all values of a vector belong to one group, so all lanes have the same scale.
MISTRAL_SIMD Ints add_pairs(Ints sums, Shorts a, Shorts b) {
  sums.v = vmlal_s16(sums.v, vget_low_s16(a.v), vget_low_s16(b.v));
  return {vmlal_high_s16(sums.v, a.v, b.v)};
}

// Rounds to the nearest integers, which must fit 16 bits, and stores them.
MISTRAL_SIMD void store_rounded(int16_t* p, Vec x) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(x.v))); }

}  // namespace mistral::cpu::MISTRAL_ISA

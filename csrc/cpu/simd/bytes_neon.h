// The part of bytes.h for aarch64. Two NEON vectors make up 256 bits.
#pragma once

#include "simd.h"

namespace mistral::cpu::MISTRAL_ISA {

struct Bytes32 {
  int8x16_t v[2];
};
struct Lanes8 {
  float32x4_t v[2];
};

MISTRAL_SIMD Bytes32 load_32(const void* p) {
  const int8_t* bytes = static_cast<const int8_t*>(p);
  return {{vld1q_s8(bytes), vld1q_s8(bytes + 16)}};
}
MISTRAL_SIMD void store_32(void* p, Bytes32 x) {
  for (int i = 0; i < 2; ++i) vst1q_s8(static_cast<int8_t*>(p) + 16 * i, x.v[i]);
}
MISTRAL_SIMD Bytes32 zero_bytes() { return {{vdupq_n_s8(0), vdupq_n_s8(0)}}; }
// Rounds the 32 products x * factor to the nearest integers, which must fit bytes.
MISTRAL_SIMD Bytes32 round_32(const float* x, float factor) {
  int16x4_t fours[8];
  for (int i = 0; i < 8; ++i) {
    const float32x4_t scaled = vmulq_f32(vld1q_f32(x + 4 * i), vdupq_n_f32(factor));
    fours[i] = vmovn_s32(vcvtnq_s32_f32(scaled));
  }
  Bytes32 bytes;
  for (int i = 0; i < 2; ++i) {
    const int16x4_t* from = fours + 4 * i;
    bytes.v[i] = vcombine_s8(vmovn_s16(vcombine_s16(from[0], from[1])),
                             vmovn_s16(vcombine_s16(from[2], from[3])));
  }
  return bytes;
}
// In each half, byte i of the result is byte order[i] of the same half of x.
MISTRAL_SIMD Bytes32 shuffle_halves(Bytes32 x, const int8_t order[16]) {
  const uint8x16_t from = vreinterpretq_u8_s8(vld1q_s8(order));
  return {{vqtbl1q_s8(x.v[0], from), vqtbl1q_s8(x.v[1], from)}};
}
// out[i] = the sum of the signed bytes 4 i to 4 i + 3.
MISTRAL_SIMD void store_sums_of_fours(int32_t out[8], Bytes32 x) {
  for (int i = 0; i < 2; ++i) vst1q_s32(out + 4 * i, vpaddlq_s16(vpaddlq_s8(x.v[i])));
}

// Adds to each 32-bit lane the sum of the products of 4 signed bytes. Processors without the
// instruction for this add pairs of products in 16 bits first. Two products of up to 127 x 127 fit
// 16 bits.
MISTRAL_SIMD int32x4_t add_byte_products(int32x4_t sums, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
#endif
}

// The 32-bit lane of a block, 0 to 7. Unlike in bytes.h, lanes are in the order of the blocks.
constexpr int lane_of(int block) { return block; }

MISTRAL_SIMD void store_lanes(float* p, Lanes8 x) {
  for (int i = 0; i < 2; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
// Lane i of the result is the sum of the lanes of x[i].
MISTRAL_SIMD Lanes8 sums_of_lanes(const Lanes8 x[8]) {
  Lanes8 out;
  for (int i = 0; i < 2; ++i) {
    float32x4_t halves[4];
    for (int j = 0; j < 4; ++j) halves[j] = vaddq_f32(x[4 * i + j].v[0], x[4 * i + j].v[1]);
    out.v[i] = vpaddq_f32(vpaddq_f32(halves[0], halves[1]), vpaddq_f32(halves[2], halves[3]));
  }
  return out;
}

}  // namespace mistral::cpu::MISTRAL_ISA

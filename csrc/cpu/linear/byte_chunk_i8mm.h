// The chunk for several tokens on aarch64 with i8mm. (One token alone is multiplied by ByteRow of
// byte_chunk_neon.h.) An instruction multiplies 8 values of two rows by 8 activations of two
// tokens, and adds to four sums. The sums are exact integers, and they are scaled and added in the
// order of ByteRow. So a token gets the same bits here as from ByteRow.
#pragma once

namespace mistral::cpu::MISTRAL_ISA {

template <WeightFormat format>
struct ByteChunk : ByteFormat<format> {
  using Format = ByteFormat<format>;
  using Format::kBits, Format::kSigned, Format::kTable, Format::kScalesOfHalves;
  static constexpr int kRows = 2;
  static constexpr int kTokens = 2;
  using OneRow = ByteRow<format>;
  static constexpr bool kMinimum = OneRow::kMinimum;

  // v[b] has the four sums of block b: those of the first row with both tokens, then those of the
  // second row with both.
  struct Sums {
    float32x4_t v[8];
  };
  // out[4 i + 2 r + t]: the sum of row r and token t in sums[i].
  static void store_sums(const Sums (&sums)[8], float, float* out) {
    for (int i = 0; i < 8; ++i) {
      float32x4_t halves[4];
      for (int j = 0; j < 4; ++j) halves[j] = vaddq_f32(sums[i].v[j], sums[i].v[4 + j]);
      vst1q_f32(out + 4 * i,
                vaddq_f32(vaddq_f32(halves[0], halves[1]), vaddq_f32(halves[2], halves[3])));
    }
  }

  // [block][part, as in PairActivations (byte_activations.h)]: 8 values of each row
  int8x16_t values[8][4];
  // In the next three arrays, as in the sums, the first two lanes of a vector belong to row 0 and
  // the other two to row 1.
  float32x4_t factor[8];   // the scale of each block
  float32x4_t minimum[8];  // if kMinimum: the offset of each block; multiplies sums of activations
  int32x4_t scales[8][2];  // if kScalesOfHalves: the scales of the halves of each block

  MISTRAL_SIMD void take(const char* const (&words)[2], const char* const (&row_scales)[2],
                         int group_log2, int64_t k, int64_t there) {
    for (int block = 0; block < 8; ++block) {
      const uint64x2_t first = load_words_of(words[0], block);
      const uint64x2_t second = load_words_of(words[1], block);
      take_words(words, block, 0, vreinterpretq_u8_u64(vzip1q_u64(first, second)));
      take_words(words, block, 1, vreinterpretq_u8_u64(vzip2q_u64(first, second)));
    }
    typename OneRow::Numbers of_rows[2];
    for (int r = 0; r < 2; ++r) of_rows[r].take(row_scales[r], group_log2, k, there);
    const auto both = [](float first, float second) {
      return vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
    };
    for (int i = 0; i < 8; ++i) {
      factor[i] = both(of_rows[0].factors[i], of_rows[1].factors[i]);
      if (kMinimum) minimum[i] = both(of_rows[0].minima[i], of_rows[1].minima[i]);
      for (int half = 0; kScalesOfHalves && half < 2; ++half) {
        const int32_t* rows[2] = {of_rows[0].of_halves + 8 * half, of_rows[1].of_halves + 8 * half};
        scales[i][half] = vcombine_s32(vdup_n_s32(rows[0][i]), vdup_n_s32(rows[1][i]));
      }
    }
  }

  // Adds the products of each block with the activations of N pairs of tokens to `totals`. A block
  // is multiplied by all pairs before the next block, so that its values stay in registers.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Sums (&totals)[N]) const {
#pragma GCC unroll 8
    for (int block = 0; block < 8; ++block) {
      int32x4_t sums[N], last[N];
      for (int n = 0; n < N; ++n) sums[n] = last[n] = vdupq_n_s32(0);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        for (int n = 0; n < N; ++n) {
          const auto* x = reinterpret_cast<const PairActivations*>(lines[n]);
          int32x4_t& sum = kScalesOfHalves && part >= 2 ? last[n] : sums[n];
          sum = vmmlaq_s32(sum, values[block][part], vld1q_s8(x->values[block][part][0]));
        }
      }
      for (int n = 0; n < N; ++n) {
        const auto* x = reinterpret_cast<const PairActivations*>(lines[n]);
        if (kScalesOfHalves) {
          sums[n] = vmlaq_s32(vmulq_s32(sums[n], scales[block][0]), last[n], scales[block][1]);
        }
        float32x4_t& total = totals[n].v[block];
        const float32x4_t scale = vmulq_f32(factor[block], vld1q_f32(x->scale[block][0]));
        total = vfmaq_f32(total, vcvtq_f32_s32(sums[n]), scale);
        if (kMinimum) total = vfmaq_f32(total, minimum[block], vld1q_f32(x->sum[block][0]));
      }
    }
  }

 private:
  MISTRAL_SIMD static uint64x2_t load_words_of(const char* words, int block) {
    return vreinterpretq_u64_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(words) + 16 * block));
  }

  // Unpacks words 2 * pair and 2 * pair + 1 of a block. `packed` has these words of the first row,
  // then those of the second row.
  MISTRAL_SIMD void take_words(const char* const (&words)[2], int block, int pair,
                               uint8x16_t packed) {
    // Turns two's complement into unsigned values that are 8 larger.
    if (kSigned) packed = veorq_u8(packed, vdupq_n_u8(0x88));
    uint32x4_t further = {};  // the further words of both rows (csrc/formats.h)
    if (kBits > 4) {
      const int64_t at = kSuperBlock / 2 + 4 * (kBits == 5 ? block : 8 * pair + block);
      further = vcombine_u32(load_twice(words[0] + at), load_twice(words[1] + at));
    }
    for (int half = 0; half < 2; ++half) {
      uint8x16_t value = half == 0 ? vandq_u8(packed, vdupq_n_u8(15)) : vshrq_n_u8(packed, 4);
      if (kBits > 4) {
        // In each byte, moves the further bits of this value to bit 4.
        const auto shift = [&](int word) {
          const int bit =
              kBits == 5 ? fifth_bit_shift(word, 4 * half) : high_bits_shift(word, 4 * half);
          return vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(4 - bit)));
        };
        const int32x4_t shifts = vzip1q_s32(shift(2 * pair), shift(2 * pair + 1));
        const uint8x16_t moved =
            vshlq_u8(vreinterpretq_u8_u32(further), vreinterpretq_s8_s32(shifts));
        value = vorrq_u8(value, vandq_u8(moved, vdupq_n_u8(kBits == 5 ? 0x10 : 0x30)));
      }
      values[block][2 * pair + half] = OneRow::number(value);
    }
  }
  MISTRAL_SIMD static uint32x2_t load_twice(const char* p) {
    uint32_t word;
    memcpy(&word, p, sizeof word);
    return vdup_n_u32(word);
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

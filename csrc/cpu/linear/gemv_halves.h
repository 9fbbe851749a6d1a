// gemv for weights of 8 bits on aarch64 with dot products. They multiply bytes without widening
// them. The activations of a token become 16-bit integers, in a unit that is chosen for the token.
// Each integer is split into two signed bytes:
//
//   activation = 256 high + low
//
// The products of 32 weights with the high bytes are summed as integers, and those with the low
// bytes likewise. So the sums are exact. The sums of four blocks of 32 become floats together. With
// i8mm and several tokens, an instruction multiplies 8 weights of two rows by the high and by the
// low bytes of a token.
#pragma once

#include "gemv_chunks.h"

namespace mistral::cpu::MISTRAL_ISA {

// A tag in the place of a chunk type (formats.h). It selects the kernels of this file (Few, below).
template <WeightFormat format>
struct InHalves {
  struct Arithmetic {
    using Element = char;
  };
};

// Whether these kernels multiply a format. They do so if its values are bytes.
constexpr bool has_half_products([[maybe_unused]] WeightFormat format) {
#if defined(__ARM_FEATURE_DOTPROD)
  return info(format).bits == 8;
#else
  return false;
#endif
}

struct HalvesLayout;

#if defined(__ARM_FEATURE_DOTPROD)

// What the chunk types (gemv_chunks.h) of all formats have in common. It does not depend on the
// format, so weights of several formats can share packed activations (PackedAlike in
// activations.h).
struct HalvesLayout {
  static constexpr int kTokens = 1;
  static constexpr int64_t kValues = 128;
  static constexpr int64_t kBytes = kValues;
  static constexpr int kBlocks = 4;

  // A packed token begins with its unit. A line has the high and the low bytes of kValues values.
  static constexpr int64_t kHeadBytes = 64;
  static constexpr int64_t kLineBytes = 2 * kValues;
  static float unit(const char* x) {
    float value;
    memcpy(&value, x, sizeof value);
    return value;
  }
};

// The code that the chunks of one row and of two rows share.
template <WeightFormat format>
struct HalvesFormat : HalvesLayout {
  // The scales of the four blocks from value k on. The row has `there` of their values. Blocks past
  // the end of the row get the scale 0, or that of the row.
  MISTRAL_SIMD static float32x4_t scales_at(const char* row_scales, int64_t k, int64_t there) {
    if (info(format).least_group == 0) {  // one scale for the whole row
      return vdupq_n_f32(to_float(*reinterpret_cast<const bf16*>(row_scales)));
    }
    const auto* from = reinterpret_cast<const f16*>(row_scales) + k / 32;
    return there == kValues ? load(from).v : load_first(from, there / 32).v;
  }
  // The sums of blocks, 256 high + low, as floats.
  MISTRAL_SIMD static float32x4_t joined(int32x4_t high, int32x4_t low) {
    return vcvtq_f32_s32(vmlaq_n_s32(low, high, 256));
  }
};

template <WeightFormat format>
struct HalvesRow : HalvesFormat<format> {
  using Format = HalvesFormat<format>;
  using Format::kBlocks;
  static constexpr int kRows = 1;
  using OneRow = HalvesRow;

  using Sums = float32x4_t;  // a lane for each block
  static void store_sums(const Sums (&sums)[8], float unit, float* out) {
    for (int i = 0; i < 8; i += 4) {
      const float32x4_t all =
          vpaddq_f32(vpaddq_f32(sums[i], sums[i + 1]), vpaddq_f32(sums[i + 2], sums[i + 3]));
      vst1q_f32(out + i, vmulq_n_f32(all, unit));
    }
  }

  int8x16_t values[2 * kBlocks];
  float32x4_t factor;

  MISTRAL_SIMD void take(const char* const (&bytes)[1], const char* const (&scales)[1], int,
                         int64_t k, int64_t there) {
    const auto* from = reinterpret_cast<const int8_t*>(bytes[0]);
    for (int i = 0; i < 2 * kBlocks; ++i) values[i] = vld1q_s8(from + 16 * i);
    factor = Format::scales_at(scales[0], k, there);
  }

  // A line has 16 high bytes and 16 low bytes in turn.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Sums (&totals)[N]) const {
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const int8_t*>(lines[n]);
      int32x4_t high[kBlocks], low[kBlocks];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        high[block] = low[block] = vdupq_n_s32(0);
        for (int i = 2 * block; i < 2 * block + 2; ++i) {
          high[block] = vdotq_s32(high[block], values[i], vld1q_s8(x + 32 * i));
          low[block] = vdotq_s32(low[block], values[i], vld1q_s8(x + 32 * i + 16));
        }
      }
      totals[n] = vfmaq_f32(totals[n], Format::joined(sums(high), sums(low)), factor);
    }
  }

 private:
  // Lane i is the sum of the lanes of x[i].
  MISTRAL_SIMD static int32x4_t sums(const int32x4_t (&x)[4]) {
    return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3]));
  }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)

// The chunk for two rows. Its sums are those of HalvesRow, and are added in the same order.
template <WeightFormat format>
struct HalvesRows : HalvesFormat<format> {
  using Format = HalvesFormat<format>;
  using Format::kBlocks;
  static constexpr int kRows = 2;
  using OneRow = HalvesRow<format>;

  struct Sums {
    float32x4_t v[2];  // blocks 0 and 1, then blocks 2 and 3; in each the two rows alternate
  };
  static void store_sums(const Sums (&sums)[8], float unit, float* out) {
    for (int i = 0; i < 8; ++i) {
      float32x2_t pairs[2];
      for (int j = 0; j < 2; ++j) {
        pairs[j] = vadd_f32(vget_low_f32(sums[i].v[j]), vget_high_f32(sums[i].v[j]));
      }
      vst1_f32(out + 2 * i, vmul_n_f32(vadd_f32(pairs[0], pairs[1]), unit));
    }
  }

  int8x16_t values[kBlocks][4];  // a vector has 8 values of each row
  float32x4_t factors[2];

  MISTRAL_SIMD void take(const char* const (&bytes)[2], const char* const (&scales)[2], int,
                         int64_t k, int64_t there) {
    for (int i = 0; i < 2 * kBlocks; ++i) {
      int64x2_t of_rows[2];
      for (int r = 0; r < 2; ++r) {
        const auto* from = reinterpret_cast<const int8_t*>(bytes[r]) + 16 * i;
        of_rows[r] = vreinterpretq_s64_s8(vld1q_s8(from));
      }
      int8x16_t* of_block = values[i / 2] + i % 2 * 2;
      of_block[0] = vreinterpretq_s8_s64(vzip1q_s64(of_rows[0], of_rows[1]));
      of_block[1] = vreinterpretq_s8_s64(vzip2q_s64(of_rows[0], of_rows[1]));
    }
    const float32x4_t first = Format::scales_at(scales[0], k, there);
    const float32x4_t second = Format::scales_at(scales[1], k, there);
    factors[0] = vzip1q_f32(first, second);
    factors[1] = vzip2q_f32(first, second);
  }

  // A line has 8 high bytes and 8 low bytes in turn.
  template <int N>
  MISTRAL_SIMD void add(const char* const (&lines)[N], Sums (&totals)[N]) const {
    for (int n = 0; n < N; ++n) {
      const auto* x = reinterpret_cast<const int8_t*>(lines[n]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        int32x4_t sums[2];  // for each block: high and low of row 0, then of row 1
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int block = 2 * j + i;
          sums[i] = vdupq_n_s32(0);
          for (int part = 0; part < 4; ++part) {
            sums[i] =
                vmmlaq_s32(sums[i], values[block][part], vld1q_s8(x + 64 * block + 16 * part));
          }
        }
        const int32x4_t high = vuzp1q_s32(sums[0], sums[1]), low = vuzp2q_s32(sums[0], sums[1]);
        totals[n].v[j] = vfmaq_f32(totals[n].v[j], Format::joined(high, low), factors[j]);
      }
    }
  }
};

template <WeightFormat format>
struct Few<InHalves<format>> : FewInChunks<HalvesRows<format>> {};

#else

template <WeightFormat format>
struct Few<InHalves<format>> : FewInChunks<HalvesRow<format>> {};

#endif

// The number of bytes of the packed K activations of a token.
constexpr int64_t packed_halves_row(int64_t inputs) {
  using Layout = HalvesLayout;
  return Layout::kHeadBytes + ceil_div(inputs, Layout::kValues) * Layout::kLineBytes;
}

// The unit in which all of some numbers can be split into two signed bytes. The largest integer of
// two signed bytes is 256 x 127 + 127 = 32639. So the unit is that of unit_of (integers.h) or, if
// the largest number would then be rounded to more than 32639, twice as large. `magnitude` is the
// same as for unit_of: the largest magnitude of the numbers, as the bits of a float.
inline Unit unit_of_halves(int32_t magnitude) {
  const Unit unit = unit_of(magnitude);
  float largest;
  memcpy(&largest, &magnitude, sizeof largest);
  // 32639.5 would be rounded to 32640.
  if (largest * unit.inverse >= 32639.5f) return {2 * unit.value, unit.inverse / 2};
  return unit;
}

// Packs the K activations of a token for HalvesRow or, if `together`, for HalvesRows.
template <bool together, class T>
void pack_halves(const T* x, int64_t inputs, char* out) {
  const Unit unit = unit_of_halves(largest_magnitude(x, inputs));
  memcpy(out, &unit.value, sizeof unit.value);
  using Layout = HalvesLayout;
  auto* to = reinterpret_cast<int8_t*>(out + Layout::kHeadBytes);
  for (int64_t k = 0; k < ceil_div(inputs, Layout::kValues) * Layout::kValues; k += 8) {
    int16_t rounded[8];
    for (int64_t i = 0; i < 8; i += Vec::width) {
      const int64_t there = mistral::max(int64_t{0}, inputs - k - i);
      const Vec values = there >= Vec::width ? load(x + k + i) : load_first(x + k + i, there);
      store_rounded(rounded + i, values * broadcast(unit.inverse));
    }
    const int16x8_t both = vld1q_s16(rounded);
    // The low byte is signed, so it stands for 256 less if its highest bit is set. Then the high
    // byte must be one more. A shift with rounding computes just that.
    int8_t* high = to + 2 * k;
    if (!together && k % 16 != 0) high -= 8;
    vst1_s8(high, vrshrn_n_s16(both, 8));
    vst1_s8(high + (together ? 8 : 16), vmovn_s16(both));
  }
}

#endif

}  // namespace mistral::cpu::MISTRAL_ISA

// Merges partial results, each of which covers some of the keys.
#pragma once

#include "../common/vec.cuh"
#include "rows.cuh"

namespace mistral::cuda {

// The number of floats in a partial result of one query row: D unnormalised sums, the largest score
// (unscaled), the sum of the exponentials, and two floats that only align the next row.
template <int D>
constexpr int kPartialRow = D + 4;

// 8 elements of a row, merged from several partial results.
struct Merged {
  float sums[8];
  float maximum;
  float total;
};

// Merges elements d to d + 7 of a row from `parts` partial results. `scale` is p.scale * log2(e).
// row_of(i) is the address of the row in result i, and read(address) loads 4 floats.
//
// Each lane reads 32 bytes, in two halves, and neighbouring lanes read neighbouring bytes. If all
// lanes read the lower half first, lanes that are 4 apart would access the same banks of shared
// memory. So every second group of 4 lanes reads the upper half first.
template <int D, class RowOf, class Read>
__device__ __forceinline__ Merged merge(int parts, int d, float scale, const RowOf& row_of,
                                        const Read& read) {
  Merged merged = {};
  merged.maximum = -INFINITY;
  for (int i = 0; i < parts; ++i) {
    merged.maximum = fmaxf(merged.maximum, read(row_of(i) + D)[0]);
  }
  const bool upper_first = d / 8 % 8 >= 4;
  const int first = upper_first ? 4 : 0, second = 4 - first;
  // The maximum is -inf if the row sees none of the keys of these parts. The base must be finite,
  // because -inf - -inf would be NaN.
  const float base = merged.maximum == -INFINITY ? 0.0f : merged.maximum * scale;
#pragma unroll 8  // so that the loads of 8 parts are under way together
  for (int i = 0; i < parts; ++i) {
    const float* row = row_of(i);
    const Vec16<float> state = read(row + D);
    const Vec16<float> a = read(row + d + first), b = read(row + d + second);
    const float factor = exp2_approx(state[0] * scale - base);
    merged.total += factor * state[1];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      merged.sums[j] += factor * (upper_first ? b[j] : a[j]);
      merged.sums[j + 4] += factor * (upper_first ? a[j] : b[j]);
    }
  }
  return merged;
}

template <class T, int D>
__device__ __forceinline__ void store_result(const AttentionParams& p, const QueryRows& rows,
                                             int row, int d, const Merged& merged) {
  const float inverse = 1.0f / merged.total;
  float out[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = merged.sums[j] * inverse;
  T* global = static_cast<T*>(p.out) + rows.offset(row, p.stride_out_token, p.stride_out_head);
  store16(global + d, round_to<T, 8>(out));
}

// Stores the log-sum-exp of a row (attention.h). `maximum` is the maximum of the unscaled scores.
// `total` is the sum of exp(p.scale * (score - maximum)).
__device__ __forceinline__ void store_lse(const AttentionParams& p, const QueryRows& rows, int row,
                                          float maximum, float total) {
  store_global(p.lse + rows.offset(row, p.heads, 1), maximum * p.scale + logf(total));
}

}  // namespace mistral::cuda

// The products of prefill.h with AMX. 32 query rows are multiplied by 32 keys, or 32 rows of
// probabilities by 32 columns of values, with the sums in 2 x 2 tile registers. The arrays that
// prefill.h packs are operands of tile_dot_bf16 (amx.h) without repacking. q and the probabilities
// are operand a. The transposed keys are operand b, and so are the values, which pack_values
// interleaves in pairs of keys.
#pragma once

#include "../simd/amx.h"
#include "rows.h"

namespace mistral::cpu::MISTRAL_ISA {

struct AmxProducts {
  static constexpr int64_t kRowStep = 2 * kTileRows;
  static constexpr int64_t kKeyStep = 2 * kTileRows;

  using Setup = TilesInUse;

  template <int64_t kKeys>
  static void score(const bf16* q, int64_t rows, const bf16* k, int64_t count, int64_t dim,
                    float* scores) {
    for (int64_t row = 0; row < rows; row += kRowStep) {
      for (int64_t key = 0; key < count; key += kKeyStep) {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        add_products(q + row * dim, dim, k + key * 2, kKeys, dim);
        store_sums(scores + row * kKeys + key, kKeys);
      }
    }
  }

  // out = factors * out + p v. The products of all tiles of keys are added to `out` itself, without
  // a sum of their own for each tile. This loses few digits, because the instruction sums 32
  // products before it adds them.
  template <int64_t kKeys>
  static void accumulate(const bf16* p, const float* factors, int64_t rows, const bf16* v,
                         int64_t count, int64_t dim, float* out) {
    for (int64_t row = 0; row < rows; ++row) scale_row(out + row * dim, factors[row], dim);
    add<kKeys>(p, rows, v, count, dim, out);
  }

  // Does the same as `accumulate` with factors of 1.
  template <int64_t kKeys>
  static void add(const bf16* p, int64_t rows, const bf16* v, int64_t count, int64_t dim,
                  float* out) {
    for (int64_t row = 0; row < rows; row += kRowStep) {
      for (int64_t d = 0; d < dim; d += 2 * kTileRows) {
        float* sums = out + row * dim + d;
        load_sums(sums, dim);
        add_products(p + row * kKeys, kKeys, v + d * 2, dim, count);
        store_sums(sums, dim);
      }
    }
  }

 private:
  // Tile registers 0 and 1 hold the sums of the first 16 rows, registers 2 and 3 those of the other
  // 16 rows. Operand a [32, depth] has rows that are stride_a elements apart. Operand b [depth / 2,
  // 32, 2] has rows that are 2 stride_b elements apart.
  MISTRAL_SIMD static void add_products(const bf16* a, int64_t stride_a, const bf16* b,
                                        int64_t stride_b, int64_t depth) {
    constexpr int64_t kBytes = sizeof(bf16), kDepth = 2 * kTileRows;
    for (int64_t k = 0; k < depth; k += kDepth) {
      tile_load<4>(a + k, stride_a * kBytes);
      tile_load<6>(b + k * stride_b, 2 * stride_b * kBytes);
      tile_dot_bf16<0, 4, 6>();
      tile_load<7>(b + k * stride_b + 2 * kTileRows, 2 * stride_b * kBytes);
      tile_dot_bf16<1, 4, 7>();
      tile_load<5>(a + kTileRows * stride_a + k, stride_a * kBytes);
      tile_dot_bf16<2, 5, 6>();
      tile_dot_bf16<3, 5, 7>();
    }
  }

  MISTRAL_SIMD static void load_sums(const float* sums, int64_t stride) {
    constexpr int64_t kBytes = sizeof(float);
    tile_load<0>(sums, stride * kBytes);
    tile_load<1>(sums + kTileRows, stride * kBytes);
    tile_load<2>(sums + kTileRows * stride, stride * kBytes);
    tile_load<3>(sums + kTileRows * stride + kTileRows, stride * kBytes);
  }

  MISTRAL_SIMD static void store_sums(float* sums, int64_t stride) {
    constexpr int64_t kBytes = sizeof(float);
    tile_store<0>(sums, stride * kBytes);
    tile_store<1>(sums + kTileRows, stride * kBytes);
    tile_store<2>(sums + kTileRows * stride, stride * kBytes);
    tile_store<3>(sums + kTileRows * stride + kTileRows, stride * kBytes);
  }

  // Multiplies a row by its factor. Usually the factor is 1, because most tiles do not change the
  // maximum of a row.
  MISTRAL_SIMD static void scale_row(float* out, float factor, int64_t dim) {
    if (factor == 1.0f) return;
    for (int64_t d = 0; d < dim; d += Vec::width) {
      store(out + d, load(out + d) * broadcast(factor));
    }
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

// The tile of gemm.h with AMX: 32 rows of weights times 32 tokens, with the sums in 2 x 2 tile
// registers. Unpacked weights are operand a of tile_dot_bf16 (amx.h), and packed activations are
// its operand b. Neither has to be rearranged.
//
// Loads of tile registers could limit the speed. A product takes 16 cycles and a load from the L1
// cache 8. So 4 loads for 4 products take half of the time of the products if they are from L1, but
// longer from L2. The weights of a block (24 KB) therefore stay in L1 (48 KB), beside the
// activations of two vectors (8 KB). The next activations and sums are prefetched between the
// products. The activations of a block (128 KB) and the sums of a task (576 KB) stay in L2 (2 MB).
#pragma once

#include "../simd/amx.h"
#include "formats.h"

namespace mistral::cpu::MISTRAL_ISA {

// The tile class for tasks of kBlocks blocks of rows. The gradient (backward.cpp) takes more blocks
// than `linear`.
template <int64_t kBlocks>
struct AmxTileOf {
  using Element = bf16;
  static constexpr int64_t kDepth = 2;
  static constexpr int64_t kBlockDepth = 128;
  // With kBlockTokens tokens, unpacking a block of weights is a small part of the work. With
  // kTaskRows rows, fetching a block of activations is a small part, too.
  static constexpr int64_t kBlockTokens = 512;
  static constexpr int64_t kBlockRows = 96;
  static constexpr int64_t kTaskRows = kBlocks * kBlockRows;
  static constexpr int64_t kFewTokens = 256;
  static constexpr int64_t kFewRows = 2 * kTileRows;
  static constexpr int64_t kVectors = 2;
  static constexpr int rows(int) { return 2 * kTileRows; }

  using Setup = TilesInUse;

  // Does the same as VectorTile::multiply, but one sum runs over all blocks. This loses few digits,
  // because the instruction itself sums 32 products before it adds them to the sum. The function is
  // not inlined: inside its caller, GCC 12 would run out of registers for addresses.
  template <int R, int M>
  [[gnu::noinline]] static void multiply(const bf16* all_weights, int64_t row, const bf16* x,
                                         int64_t stride_x, int64_t depth, bool first,
                                         float* all_sums) {
    static_assert(R == 2 * kTileRows && Vec::width == kTileRows, "");
    constexpr int64_t kTileDepth = kTileRowBytes / int64_t{sizeof(bf16)};
    constexpr int64_t kStride = kBlockDepth * int64_t{sizeof(bf16)};  // in bytes
    constexpr int64_t kTileSums = kTileRows * kTileRows;
    constexpr int64_t kVectorSums = kTaskRows * kTileRows;
    const bf16* weights = all_weights + row * kBlockDepth;
    float* sums = all_sums + row * kTileRows;

    // Each step along k prefetches a share of the next vectors of x and of the sums of the next
    // tile. The next vectors must be in the cache when all rows have been multiplied.
    constexpr int64_t kSteps = kBlockDepth / kTileDepth;
    constexpr int64_t kVectorLines = kBlockDepth * kTileRows * int64_t{sizeof(bf16)} / 64;
    constexpr int64_t kLines = ceil_div(M * kVectorLines, kSteps * kBlockRows / R);
    constexpr int64_t kSumLines = R / kSteps;
    const char* next_x =
        reinterpret_cast<const char*>(x + M * stride_x) + row / R * kSteps * kLines * 64;
    const float* next_sums =
        row + R < kBlockRows ? sums + R * kTileRows : all_sums + M * kVectorSums;

    // Tile registers 0 and 1 hold the sums of the first vector of tokens, for the first and the
    // second 16 rows. Registers 2 and 3 hold those of the second vector.
    if (first) {
      tile_zero<0>();
      tile_zero<1>();
      if (M == 2) tile_zero<2>();
      if (M == 2) tile_zero<3>();
    } else {
      tile_load<0>(sums, kTileRowBytes);
      tile_load<1>(sums + kTileSums, kTileRowBytes);
      if (M == 2) tile_load<2>(sums + kVectorSums, kTileRowBytes);
      if (M == 2) tile_load<3>(sums + kVectorSums + kTileSums, kTileRowBytes);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      tile_load<4>(x + k * kTileRows, kTileRowBytes);
      tile_load<6>(weights + k, kStride);
      tile_dot_bf16<0, 6, 4>();
      tile_load<7>(weights + kTileRows * kBlockDepth + k, kStride);
      tile_dot_bf16<1, 7, 4>();
      if (M == 2) {
        tile_load<5>(x + stride_x + k * kTileRows, kTileRowBytes);
        tile_dot_bf16<2, 6, 5>();
        tile_dot_bf16<3, 7, 5>();
      }
      fetch_lines<kLines>(next_x);
      for (int m = 0; m < M; ++m) fetch_lines<kSumLines>(next_sums + m * kVectorSums);
      next_x += kLines * 64;
      next_sums += kSumLines * kTileRows;
    }
    tile_store<0>(sums, kTileRowBytes);
    tile_store<1>(sums + kTileSums, kTileRowBytes);
    if (M == 2) tile_store<2>(sums + kVectorSums, kTileRowBytes);
    if (M == 2) tile_store<3>(sums + kVectorSums + kTileSums, kTileRowBytes);
  }

 private:
  // Prefetches cache lines into L1.
  template <int64_t lines>
  MISTRAL_SIMD static void fetch_lines(const void* p) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(p) + i * 64);
  }
};

using AmxTile = AmxTileOf<3>;

}  // namespace mistral::cpu::MISTRAL_ISA

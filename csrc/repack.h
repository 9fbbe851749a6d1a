// Splits the blocks of GGUF files into values and scales, without loss. A file stores the scales of
// a block beside its values. Our kernels read scales and values from separate arrays, and values of
// 4 to 6 bits as words (formats.h). There is only a CPU version, because files are read on the CPU.
//
// Source of the layouts of blocks: ggml's ggml-common.h and ggml-quants.c (MIT).
#pragma once

#include "formats.h"

namespace mistral {

// The block types that can be split. Q5_0 and Q3_K become formats with more bits, which hold the
// same numbers. Every other type becomes the format of its own name.
enum class BlockType { q4_0, q4_1, q5_0, q8_0, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs };

struct BlockInfo {
  const char* name;  // ggml's name of the type
  int64_t values;    // neighbouring values of a row in a block; a group of the result has as many
  int64_t bytes;
  WeightFormat format;
};

constexpr int kNumBlockTypes = 10;
constexpr BlockInfo kBlockTypes[kNumBlockTypes] = {
    {"Q4_0", 32, 18, WeightFormat::q4_0},     {"Q4_1", 32, 20, WeightFormat::q4_1},
    {"Q5_0", 32, 22, WeightFormat::q8_0},     {"Q8_0", 32, 34, WeightFormat::q8_0},
    {"Q3_K", 256, 110, WeightFormat::q6_k},   {"Q4_K", 256, 144, WeightFormat::q4_k},
    {"Q5_K", 256, 176, WeightFormat::q5_k},   {"Q6_K", 256, 210, WeightFormat::q6_k},
    {"IQ4_NL", 32, 18, WeightFormat::iq4_nl}, {"IQ4_XS", 256, 136, WeightFormat::iq4_xs},
};
[[gnu::always_inline]] inline constexpr const BlockInfo& info(BlockType type) {
  return kBlockTypes[static_cast<int>(type)];
}

// The number of bytes of values or scales into which a block is split.
[[gnu::always_inline]] inline constexpr int64_t value_bytes(const BlockInfo& block) {
  return block.values * info(block.format).bits / 8;
}
[[gnu::always_inline]] inline constexpr int64_t scale_bytes(const BlockInfo& block) {
  return info(block.format).group_scales * info(block.format).scale_bytes;
}

struct RepackParams {
  BlockType type;
  const uint8_t* blocks;  // [N, B] blocks, at any address
  uint8_t* values;        // [N, B * value_bytes], contiguous; null: do not write values
  uint8_t* scales;        // [N, B * scale_bytes], contiguous; null: do not write scales
  int64_t rows;           // N
  int64_t row_blocks;     // B
  int64_t stride_row;     // bytes from one row of blocks to the next
};

namespace cpu {
void repack(const RepackParams& p, int threads);
}

}  // namespace mistral

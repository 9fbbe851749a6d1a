// Rounds weights to the formats iq4_nl and iq4_xs, whose values come from kTable4 (csrc/formats.h).
// There is only a CPU version, because weights are quantised before they are moved to a device.
#pragma once

#include "formats.h"

namespace mistral {

struct QuantizeParams {
  DType dtype;              // of weight
  bool two_levels;          // true: iq4_xs; false: iq4_nl
  const void* weight;       // [N, K]
  const float* importance;  // [K], how much an error in each column counts; null: all count alike
  uint32_t* values;         // [N, K / 8], contiguous
  void* scales;             // [N, K / 32] fp16 or [N, K / 256] of 8 bytes, contiguous
  float* largest;  // [N], the largest magnitude of a row; NaN if a value is NaN or infinite, so
                   // that the caller can refuse such a weight
  int64_t rows;    // N
  int64_t inputs;  // K, a multiple of 32, or of 256 with two levels
  int64_t stride_weight_row;
};

// Quantises a block of at most 256 neighbouring columns of a weight, one column after another. The
// error of a column is compensated in the later columns of the block. This is the inner loop of
// GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1). The caller corrects the columns after
// the block.
struct QuantizeFeedbackParams {
  bool two_levels;          // true: iq4_xs; false: iq4_nl
  float* weight;            // [N, B], overwritten: each element becomes what the caller needs to
                            // correct the columns after the block, the error of the weight divided
                            // by the diagonal element of `factor` for its column
  const float* factor;      // [B, B], upper triangle, 0 below: the block of the Cholesky factor of
                            // the inverse Hessian
  const float* importance;  // [B], how much an error in each column counts; null: all count alike
  uint32_t* values;         // [N, B / 8]
  char* scales;             // [N, B / 32] fp16 or [N, B / 256] of 8 bytes
  int64_t rows;             // N
  int64_t columns;          // B, at most 256 and a multiple of 32; 256 with two levels
  int64_t stride_weight_row;
  int64_t stride_factor_row;
  int64_t stride_values_row;
  int64_t stride_scales_row;  // in bytes
};

namespace cpu {
void quantize(const QuantizeParams& p, int threads);
void quantize_feedback(const QuantizeFeedbackParams& p, int threads);
}  // namespace cpu

}  // namespace mistral

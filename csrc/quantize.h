// Rounds weights to the formats whose values come from kTable4 (csrc/formats.h): iq4_nl and iq4_xs.
// Only for the CPU: weights are quantised before they are moved to a device.
#pragma once

#include "formats.h"

namespace mistral {

struct QuantizeParams {
  DType dtype;              // of weight
  bool two_levels;          // whether the format is iq4_xs; else it is iq4_nl
  const void* weight;       // [N, K]
  const float* importance;  // [K], how much an error in an input counts; null: all count the same
  uint32_t* values;         // [N, K / 8], contiguous
  void* scales;             // [N, K / 32] fp16 or [N, K / 256] of 8 bytes, contiguous
  float* largest;           // [N], the largest magnitude of a row; NaN with NaN or infinity
  int64_t rows;             // N
  int64_t inputs;           // K, a multiple of 32, of 256 with two levels
  int64_t stride_weight_row;
};

// Rounds up to 256 neighbouring columns of a weight, one column after another. The following
// columns make up for the error of a column. This is the step of GPTQ within a block (Frantar et
// al. 2022, arXiv:2210.17323, algorithm 1). The caller corrects the columns after the block.
struct QuantizeFeedbackParams {
  bool two_levels;      // as above
  float* weight;        // [N, B], changed; on return its errors, each over the factor's diagonal
  const float* factor;  // [B, B], upper triangle, 0 below: the block of the Cholesky factor of
                        // the inverse Hessian
  const float* importance;  // [B], as above
  uint32_t* values;         // [N, B / 8]
  char* scales;             // [N, ...], as above
  int64_t rows;             // N
  int64_t columns;          // B, at most 256, a multiple of 32; 256 with two levels
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

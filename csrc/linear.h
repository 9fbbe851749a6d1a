// Products with weights, x weight^T: of a few tokens, which reading the weights once limits, and of
// many, which arithmetic limits. What the model does next to a product is done with it: RMSNorm
// before, a residual add, SwiGLU, RoPE and the append to the rings or an argmax after.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "formats.h"
#include "rope.h"
#include "sample.h"

namespace mistral {

// Rows of int8 are no longer, so that sums of integer products fit 32 bits.
constexpr int64_t kMaxInt8Inputs = int64_t{1} << 20;

// What becomes of the product.
//   store   out = product
//   add     out += product
//   swiglu  out = silu(product with the first part) * (product with the second)
//   rope    out = product, of which linear_rope rotates query and key and stores key and value
//   argmax  out = product, and token_ids = the greedy choice among it, as it is rounded; on CUDA
//           devices, of parts of one format and group
enum class Epilogue { store, add, swiglu, rope, argmax };

// A weight [rows, K]. Those of one call may have different formats.
struct WeightPart {
  const void* values;  // contiguous, as the format has them
  const void* scales;  // [rows, K / group], contiguous; plain: null
  int64_t rows;
  WeightFormat format;
  int64_t group;  // values that share a scale: K for int8; plain: 0
};

// Parts that are multiplied in one pass: query, key and value; gate and up.
constexpr int64_t kMaxParts = 3;

// The most tokens of one pass over the weights on a CUDA device: a block keeps the sums of all of
// them in registers.
constexpr int64_t kMaxPassTokens = 64;

// The argmax of a pass, while the blocks of a CUDA device contribute to it. Zero before and after.
struct RunningArgmax {
  int32_t arrived;                          // blocks that are done
  unsigned long long best[kMaxPassTokens];  // Ranks, as atomic functions want them
};

struct LinearParams {
  DType dtype;  // of x, norm, out and plain weights
  Epilogue epilogue;
  const void* x;                // [T, K]
  const void* norm;             // [K], weights of an RMSNorm of x before the product; null: none
  void* out;                    // [T, N]; N: the rows of all parts, or with swiglu of one
  void* scratch;                // linear_scratch_bytes(p), aligned to 64
  WeightPart parts[kMaxParts];  // one below the other
  int64_t num_parts;
  int64_t tokens;    // T
  int64_t inputs;    // K
  int64_t head_dim;  // D, with rope
  int64_t stride_x_token;
  int64_t stride_out_token;
  float eps;  // of the RMSNorm

  // With argmax.
  int64_t* token_ids;      // [T]; -1: an output is NaN, or all are -inf
  int64_t limit;           // outputs to choose from, the first ones
  RunningArgmax* running;  // on CUDA devices
};

// Query, key and value in one pass (parts 0, 1 and 2, stored), then rope: the same as the two ops,
// to the bit.
struct LinearRopeParams {
  LinearParams linear;
  RopeParams rope;  // q, k and v are in linear.out, as [T, Hq + 2 Hkv, D]
};

namespace cpu {

// Up to this many tokens are multiplied by gemv.h. The result of a token then has the same bits
// whatever the other tokens are.
constexpr int64_t kGemvTokens = 8;

int64_t linear_scratch_bytes(const LinearParams& p);
void linear(const LinearParams& p, int threads);

// One kernel after the other: RoPE is a hundredth of the time of a layer.
void linear_rope(const LinearRopeParams& p, int threads);

}  // namespace cpu

#ifdef MISTRAL_CUDA

// A weight with scales as numbers of `dtype`, for products by other means.
struct DequantizeParams {
  DType dtype;
  WeightPart weight;
  void* out;       // [rows, K], contiguous
  int64_t inputs;  // K
};

namespace cuda {

// Of which K has to be a multiple, so that rows of all parts are read by 16 bytes.
int64_t row_unit(const LinearParams& p);

// K is a multiple of 8; 16-byte aligned rows of `out`, 8-byte aligned ones of the weight.
cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream);

int64_t linear_scratch_bytes(const LinearParams& p);

// bf16 and fp16; 16-byte aligned rows of x, norm and the weights, scales aligned to 4. Made for up
// to 64 tokens: more are multiplied 64 at a time. Neighbouring parts of the same format and group
// are multiplied in one pass. What a token gets does not depend on the others, to the bit.
cudaError_t linear(const LinearParams& p, cudaStream_t stream);

// Of up to 64 tokens and parts of one format and group in the same pass; else linear and then rope.
cudaError_t linear_rope(const LinearRopeParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

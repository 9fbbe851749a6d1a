// Linear layers, x weight^T. With few tokens (gemv) the speed is limited by reading the weights,
// with many tokens (gemm) by arithmetic. A call can include neighbouring operations of the model.
// Before the product, this is an RMSNorm. After the product, it is a residual add, SwiGLU, RoPE
// with the append to the rings, or an argmax.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "formats.h"
#include "rope.h"
#include "sample.h"

namespace mistral {

// The operation after the product. The parts are the weights of the call (WeightPart).
//   store   out = product
//   add     out += product
//   swiglu  out = silu(product with the first part) * (product with the second part)
//   rope    out = product; linear_rope rotates its query and key and stores its key and value
//   argmax  out = product; token_ids = the index of the largest output, after rounding to dtype. On
//           CUDA devices all parts must have the same format and group.
enum class Epilogue { store, add, swiglu, rope, argmax };

// One weight [rows, K] of a call. A call multiplies the same x by several weights, its parts. The
// parts may differ in format.
struct WeightPart {
  const void* values;  // contiguous, in the layout of the format
  const void* scales;  // [rows, scales of a row], contiguous; null if plain
  int64_t rows;
  WeightFormat format;
  int64_t group;  // the number of values that share scales: K for int8, 0 for plain
};

// The most parts of a call. A call for query, key and value has this many.
constexpr int64_t kMaxParts = 3;

// The most tokens that one pass over the weights multiplies on a CUDA device. The limit is there
// because a block keeps the sums of all tokens of a pass in registers.
constexpr int64_t kMaxPassTokens = 64;

// The highest outputs of a pass so far, which all blocks of a CUDA kernel update. All fields are
// zero before and after a call.
struct RunningArgmax {
  int32_t arrived;                          // how many blocks have contributed
  unsigned long long best[kMaxPassTokens];  // the largest Rank (sample.h) of each token
};

struct LinearParams {
  DType dtype;  // of x, norm, out and plain weights
  Epilogue epilogue;
  const void* x;                // [T, K]
  const void* norm;             // [K], weights of an RMSNorm of x before the product; null: no norm
  void* out;                    // [T, N]. N: the rows of all parts; with swiglu, of one part
  const float* added;           // [T, rows of all parts], only with store and swiglu: added to the
                                // product before any other step; null: nothing is added
  void* scratch;                // linear_scratch_bytes(p) bytes, 64-byte aligned
  WeightPart parts[kMaxParts];  // in the order of their columns of out
  int64_t num_parts;
  int64_t tokens;    // T
  int64_t inputs;    // K
  int64_t head_dim;  // D, with rope
  int64_t stride_x_token;
  int64_t stride_out_token;
  int64_t stride_added_token;
  float eps;   // of the RMSNorm
  bool exact;  // keeps the CPU from rounding activations to 8 bits (gemv_bytes.h)

  // Only with argmax.
  int64_t* token_ids;  // [T]; -1: a candidate is NaN, or all are -inf
  int64_t limit;       // only the first `limit` outputs are candidates, because the last rows of
                       // a matrix may stand for no token
  RunningArgmax* running;  // CUDA only
};

// One call for a linear layer with query, key and value as parts 0, 1 and 2, and rope of its
// output. The results have the same bits as those of the two separate ops.
struct LinearRopeParams {
  LinearParams linear;
  RopeParams rope;  // q, k and v are in linear.out, as [T, Hq + 2 Hkv, D]
};

// The gradient of the input of a linear layer, d_x = d_out W. W may have any format. CUDA devices
// have no kernel for this. There the caller dequantises W and multiplies with torch.
struct LinearBackwardParams {
  DType dtype;                  // of d_out, d_x and plain weights
  const void* d_out;            // [T, N]; N: the rows of all parts
  void* d_x;                    // [T, K]
  void* scratch;                // linear_backward_scratch_bytes(p) bytes, 64-byte aligned
  WeightPart parts[kMaxParts];  // in the order of their columns of d_out
  int64_t num_parts;
  int64_t tokens;  // T
  int64_t inputs;  // K
  int64_t stride_d_out_token;
  int64_t stride_d_x_token;
};

namespace cpu {

// The most tokens that gemv multiplies. With up to this many tokens, the result of a token has the
// same bits whatever the other tokens are.
constexpr int64_t kGemvTokens = 8;

int64_t linear_scratch_bytes(const LinearParams& p);
void linear(const LinearParams& p, int threads);

// Whether `linear` with LinearParams::exact = false rounds activations to 8 bits. This depends on
// the instruction set in use, too.
bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens);

int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p);
void linear_backward(const LinearBackwardParams& p, int threads);

// Runs linear, then rope. The CPU kernels do not fuse the two, because RoPE takes only a hundredth
// of the time of a layer.
void linear_rope(const LinearRopeParams& p, int threads);

}  // namespace cpu

#ifdef MISTRAL_CUDA

// Converts rows of a weight with scales to `dtype`. `embedding` uses this, and products by torch
// need it too.
struct DequantizeParams {
  DType dtype;
  WeightPart weight;
  const int64_t* indices;  // [count], indices of rows; null: all rows in order
  void* out;               // [count, K], contiguous; a row is NaN if its index is out of range
  int64_t count;           // the number of rows of out
  int64_t inputs;          // K
};

namespace cuda {

// K must be a multiple of this number, so that the rows of all parts can be read in accesses of 16
// bytes.
int64_t row_unit(const LinearParams& p);

// K must be a multiple of 8. Rows of `out` must be 16-byte aligned, rows of the weight 8-byte
// aligned, and scales 4-byte aligned.
cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream);

int64_t linear_scratch_bytes(const LinearParams& p);

// Takes bf16 and fp16. Rows of x, norm and the weights must be 16-byte aligned, scales 4-byte
// aligned. A pass multiplies up to 64 tokens, with some formats up to 32. Neighbouring parts of the
// same format and group share a pass. The result of a token has the same bits whatever the other
// tokens are.
cudaError_t linear(const LinearParams& p, cudaStream_t stream);

// Runs linear and rope in one pass if there are up to 64 tokens, all parts have the same format and
// group, and the format has a kernel with RoPE (plain, int8, int4, q8_0). Otherwise runs linear,
// then rope.
cudaError_t linear_rope(const LinearRopeParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

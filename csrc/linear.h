// Linear layers, x weight^T. With few tokens (gemv), reading the weights limits the speed; with
// many (gemm), arithmetic does. The neighbouring operations of the model are fused: an RMSNorm
// before the product, and after it a residual add, SwiGLU, RoPE with the append to the rings, or an
// argmax.
#pragma once

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "formats.h"
#include "rope.h"
#include "sample.h"

namespace mistral {

// What is done with the product.
//   store   out = product
//   add     out += product
//   swiglu  out = silu(product with the first part) * (product with the second)
//   rope    out = product; linear_rope rotates its query and key and stores its key and value
//   argmax  out = product; token_ids = the index of the largest rounded output. On CUDA devices all
//           parts must have the same format and group.
enum class Epilogue { store, add, swiglu, rope, argmax };

// A weight [rows, K]. The weights of a call may differ in format.
struct WeightPart {
  const void* values;  // contiguous, in the layout of the format
  const void* scales;  // [rows, K / group * scales of a group], contiguous; plain: null
  int64_t rows;
  WeightFormat format;
  int64_t group;  // values that share a scale: K for int8; plain: 0
};

// The most weights that are multiplied in one pass: query, key and value.
constexpr int64_t kMaxParts = 3;

// The most tokens of one pass over the weights on a CUDA device. A block keeps the sums of all of
// them in registers.
constexpr int64_t kMaxPassTokens = 64;

// The argmax of a pass, while the blocks of a CUDA device contribute to it. All of it is zero
// before and after.
struct RunningArgmax {
  int32_t arrived;                          // blocks that are done
  unsigned long long best[kMaxPassTokens];  // Ranks, in the type of atomicMax
};

struct LinearParams {
  DType dtype;  // of x, norm, out and plain weights
  Epilogue epilogue;
  const void* x;                // [T, K]
  const void* norm;             // [K], weights of an RMSNorm of x before the product; null: none
  void* out;                    // [T, N]; N: the rows of all parts, with swiglu of one part
  const float* added;           // [T, rows of all parts], added to the products first, with store
                                // and swiglu; null: nothing
  void* scratch;                // linear_scratch_bytes(p), aligned to 64
  WeightPart parts[kMaxParts];  // in the order of their outputs
  int64_t num_parts;
  int64_t tokens;    // T
  int64_t inputs;    // K
  int64_t head_dim;  // D, with rope
  int64_t stride_x_token;
  int64_t stride_out_token;
  int64_t stride_added_token;
  float eps;   // of the RMSNorm
  bool exact;  // the CPU does not round activations to 8 bits (gemv_bytes.h)

  // With argmax.
  int64_t* token_ids;      // [T]; -1: an output is NaN, or all are -inf
  int64_t limit;           // only the first `limit` outputs are candidates
  RunningArgmax* running;  // on CUDA devices
};

// In one pass: linear with query, key and value as parts 0, 1 and 2, then rope. The results have
// the same bits as those of the two ops.
struct LinearRopeParams {
  LinearParams linear;
  RopeParams rope;  // q, k and v are in linear.out, as [T, Hq + 2 Hkv, D]
};

// The gradient of a linear layer's input, d_x = d_out W, from the same weights. There is no kernel
// for CUDA devices: the vendor's GEMM multiplies dequantised weights there.
struct LinearBackwardParams {
  DType dtype;                  // of d_out, d_x and plain weights
  const void* d_out;            // [T, N]; N: the rows of all parts
  void* d_x;                    // [T, K]
  void* scratch;                // linear_backward_scratch_bytes(p), aligned to 64
  WeightPart parts[kMaxParts];  // in the order of their columns of d_out
  int64_t num_parts;
  int64_t tokens;  // T
  int64_t inputs;  // K
  int64_t stride_d_out_token;
  int64_t stride_d_x_token;
};

namespace cpu {

// gemv.h multiplies up to this many tokens. The result of a token then has the same bits whatever
// the other tokens are.
constexpr int64_t kGemvTokens = 8;

int64_t linear_scratch_bytes(const LinearParams& p);
void linear(const LinearParams& p, int threads);

// Whether the instruction set in use rounds activations to 8 bits, unless LinearParams::exact.
bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens);

int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p);
void linear_backward(const LinearBackwardParams& p, int threads);

// Runs linear, then rope. They are not fused here, because RoPE takes only a hundredth of the time
// of a layer.
void linear_rope(const LinearRopeParams& p, int threads);

}  // namespace cpu

#ifdef MISTRAL_CUDA

// Converts a weight with scales to `dtype`. This is for products that other libraries compute, and
// for the rows of embeddings that tokens ask for.
struct DequantizeParams {
  DType dtype;
  WeightPart weight;
  const int64_t* indices;  // [count], of rows; null: all rows in order
  void* out;               // [count, K], contiguous; NaN where an index is of no row
  int64_t count;
  int64_t inputs;  // K
};

namespace cuda {

// K must be a multiple of this, so that the rows of every part are read in accesses of 16 bytes.
int64_t row_unit(const LinearParams& p);

// K must be a multiple of 8. Rows of `out` must be 16-byte aligned, rows of the weight 8-byte
// aligned, and scales 4-byte aligned.
cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream);

int64_t linear_scratch_bytes(const LinearParams& p);

// Takes bf16 and fp16. Rows of x, norm and the weights must be 16-byte aligned, scales 4-byte
// aligned. More than 64 tokens are multiplied 64 at a time, with some formats 32 at a time.
// Neighbouring parts of the same format and group are multiplied in one pass. The result of a token
// has the same bits whatever the other tokens are.
cudaError_t linear(const LinearParams& p, cudaStream_t stream);

// One pass for up to 64 tokens, if all parts have the same format and group and the format has a
// kernel with RoPE (plain, int8, int4, q8_0). Otherwise runs linear, then rope.
cudaError_t linear_rope(const LinearRopeParams& p, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace mistral

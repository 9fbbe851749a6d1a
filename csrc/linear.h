// Linear layers, x weight^T. Reading the weights limits the speed with few tokens (gemv),
// arithmetic with many (gemm). A call can include neighbouring operations of the model: an RMSNorm
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

// How the product becomes the output.
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
  const void* scales;  // [rows, scales of a row], contiguous; null if plain
  int64_t rows;
  WeightFormat format;
  int64_t group;  // the number of values that share scales: K for int8, 0 for plain
};

// The most parts of a call: query, key and value share a pass over x.
constexpr int64_t kMaxParts = 3;

// The most tokens that one pass over the weights multiplies on a CUDA device. A block keeps the
// sums of all these tokens in registers.
constexpr int64_t kMaxPassTokens = 64;

// The running argmax of a pass, to which the blocks of a CUDA device contribute. The caller zeros
// it once; every call leaves zeros.
struct RunningArgmax {
  int32_t arrived;                          // how many blocks have contributed
  unsigned long long best[kMaxPassTokens];  // the largest Rank (sample.h) of each token
};

struct LinearParams {
  DType dtype;  // of x, norm, out and plain weights
  Epilogue epilogue;
  const void* x;                // [T, K]
  const void* norm;             // [K], the weights of an RMSNorm that x gets first; null: no norm
  void* out;                    // [T, N]. N is the rows of all parts, but with swiglu of one part
  const float* added;           // [T, rows of all parts], for store and swiglu: is added to the
                                // product before anything else; null: add nothing
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
  bool exact;  // keeps the CPU from rounding activations to 8 bits (gemv_bytes.h)

  // With argmax.
  int64_t* token_ids;      // [T]; -1: a candidate is NaN, or all are -inf
  int64_t limit;           // only the first `limit` outputs are candidates
  RunningArgmax* running;  // on CUDA devices
};

// One call for a linear layer with query, key and value as parts 0, 1 and 2, and rope of its
// output. The results have the same bits as those of the two separate ops.
struct LinearRopeParams {
  LinearParams linear;
  RopeParams rope;  // q, k and v are in linear.out, as [T, Hq + 2 Hkv, D]
};

// The gradient of the input of a linear layer, d_x = d_out W. W may have any format. CUDA devices
// have no kernel for this: the caller dequantises W and multiplies it by the vendor's GEMM.
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

// The most tokens of gemv. Up to this number, the result of a token has the same bits whatever the
// other tokens are.
constexpr int64_t kGemvTokens = 8;

int64_t linear_scratch_bytes(const LinearParams& p);
void linear(const LinearParams& p, int threads);

// Whether `linear` rounds activations to 8 bits with the instruction set in use, unless
// LinearParams::exact is set.
bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens);

int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p);
void linear_backward(const LinearBackwardParams& p, int threads);

// Runs linear, then rope. The CPU kernels do not fuse the two, because RoPE takes only a hundredth
// of the time of a layer.
void linear_rope(const LinearRopeParams& p, int threads);

}  // namespace cpu

#ifdef MISTRAL_CUDA

// Converts a weight with scales to `dtype`. Products of other libraries need this, and so does
// `embedding`.
struct DequantizeParams {
  DType dtype;
  WeightPart weight;
  const int64_t* indices;  // [count], indices of rows; null: all rows in order
  void* out;               // [count, K], contiguous; a row is NaN if its index is out of range
  int64_t count;
  int64_t inputs;  // K
};

namespace cuda {

// K must be a multiple of this number. Then the rows of every part can be read in accesses of 16
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

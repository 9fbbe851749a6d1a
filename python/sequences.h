// Checks of arguments that ops on sequences share. csrc/common.h explains the letters of shapes,
// csrc/ring.h the rings and the sequence table.
#pragma once

#include <optional>

#include "../csrc/attention.h"
#include "../csrc/ring.h"
#include "tensor.h"

namespace mistral::python {

// The arguments that rope and attention share: packed q, k and v, the two pools, the sequence table
// and the window. The constructor checks them. The batch is ragged because its sequences may have
// different numbers of tokens.
struct RaggedBatch {
  RaggedBatch(const char* op, Tensor q, Tensor k, Tensor v, py::handle k_pool, py::handle v_pool,
              py::handle sequences, std::optional<int64_t> window);

  Tensor q;        // [T, Hq, D]
  Tensor k;        // [T, Hkv, D]
  Tensor v;        // [T, Hkv, D]
  Tensor k_pool;   // [R, D]
  Tensor v_pool;   // [R, D]
  Table table;     // [S, 5]
  int64_t window;  // kNoWindow if the constructor got none

  // Sets the fields that RopeParams and AttentionParams have in common.
  template <class Params>
  void fill(Params& p) const {
    p.dtype = q.dtype();
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.k_pool = k_pool.data();
    p.v_pool = v_pool.data();
    p.sequences = static_cast<const Sequence*>(table.data());
    p.num_sequences = table.size(0);
    p.tokens = q.size(0);
    p.heads = q.size(1);
    p.kv_heads = k.size(1);
    p.head_dim = q.size(2);
    p.stride_q_token = q.stride(0);
    p.stride_q_head = q.stride(1);
    p.stride_k_token = k.stride(0);
    p.stride_k_head = k.stride(1);
    p.stride_v_token = v.stride(0);
    p.stride_v_head = v.stride(1);
    p.window = window;
  }

  // The params that check_rows needs. They have the table, and the sizes that its rows must fit.
  AttentionParams table_params() const {
    AttentionParams p{};
    fill(p);
    p.pool_rows = k_pool.size(0);
    return p;
  }
};

// Checks the rows of a sequence table in CPU memory, because the kernels trust them. The tokens and
// the ring of each row must exist. No two rows may have the same token, or rings that overlap. Only
// rows with successive single tokens of one sequence may share its ring, such as tokens that were
// guessed and are verified in one pass. Uses only the fields of `p` that RaggedBatch::table_params
// sets.
void check_rows(const char* op, const AttentionParams& p);

// Checks the shapes, strides, dtypes and window of attention: q [T, Hq, D], k and v [T, Hkv, D].
void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window);

// Checks that the kernels support the head dimension of x [T, H, D].
void check_head_dim(const Tensor& x);

// Checks the scale of attention for q [T, Hq, D], and returns it as the kernels take it. Without a
// scale returns 1 / sqrt(D). The kernels multiply scores of -inf (hidden keys) by the scale, and
// the result must be -inf. So the scale must be positive, also after it is rounded to fp32.
float checked_scale(const Tensor& q, std::optional<double> scale);

// Checks that attention and its gradient support q [T, Hq, D] on a CUDA device.
void expect_cuda_heads(const Tensor& q);

// The check of the table [S, 5] for ops without rings: its sequences must hold the tokens of x (its
// first axis) one after another. If the op uses the positions of the sequences, with_positions is
// true, and they are checked, too. If the table is in GPU memory, checks only its shape and layout.
void check_packed(const Tensor& x, const Table& sequences, bool with_positions);

// Checks the frequencies of RoPE [D/2] for heads q [T, H, D], and returns their address.
const double* checked_frequencies(const Tensor& q, py::handle frequencies);

}  // namespace mistral::python

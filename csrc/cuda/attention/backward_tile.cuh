// Code that the two kernels for attention's gradients share. A block of 4 warps owns 64 rows of two
// tensors. These are keys and values in one kernel, queries and d_out in the other. Each warp owns
// 16 of these rows. The block goes through the rows of the other two tensors in tiles of 32 rows.
// It has two stages for them in shared memory: one is filled while the other is multiplied.
#pragma once

#include "../../attention_backward.h"
#include "tile_sm80.cuh"

namespace mistral::cuda {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kWarp;
constexpr int kOwnRows = 16 * kBackwardWarps;
constexpr int kWalkedRows = 32;

// The shared memory of a block: its own two tiles, then the two stages. A stage has a tile of each
// of the two tensors that the block goes through. If these are queries and d_out, the log-sum-exp
// and delta of the rows of both stages come last.
template <class T, int D>
struct BackwardShared {
  T* elements;

  static constexpr size_t kBytes = 2 * (kOwnRows + 2 * kWalkedRows) * D * sizeof(T);
  static constexpr size_t kBytesWithStatistics = kBytes + 4 * kWalkedRows * sizeof(float);

  __device__ __forceinline__ SharedTile<T, D> own(int tensor) const {
    return {elements + tensor * kOwnRows * D};
  }
  __device__ __forceinline__ SharedTile<T, D> walked(int stage, int tensor) const {
    return {elements + (2 * kOwnRows + (2 * stage + tensor) * kWalkedRows) * D};
  }
  __device__ __forceinline__ float* lse(int stage) const {
    return reinterpret_cast<float*>(walked(2, 0).elements) + 2 * stage * kWalkedRows;
  }
  __device__ __forceinline__ float* delta(int stage) const { return lse(stage) + kWalkedRows; }
};

// One key/value head of one sequence. Query rows and keys are both counted from the beginning of
// the sequence.
template <class T, int D>
struct BackwardHead {
  const AttentionBackwardParams& p;
  const QueryRows rows;
  int64_t first_token;
  int kv_head;
  int keys;

  __device__ BackwardHead(const AttentionBackwardParams& p, const Sequence& s, int kv_head)
      : p(p),
        rows(p, s, kv_head),
        first_token(s.first_token),
        kv_head(kv_head),
        keys(static_cast<int>(s.count)) {}

  // copy_queries starts the copy of kRows rows of queries and d_out. copy_keys does so for keys and
  // values. Rows past the last one become zeros, which add nothing to any sum.
  template <int kRows>
  __device__ __forceinline__ void copy_queries(SharedTile<T, D> q, SharedTile<T, D> d_out,
                                               int first) const {
    copy_rows<kRows, kBackwardThreads>(q, threadIdx.x, [&](int row) -> const T* {
      if (first + row >= rows.count) return nullptr;
      return static_cast<const T*>(p.q) +
             rows.offset(first + row, p.stride_q_token, p.stride_q_head);
    });
    copy_rows<kRows, kBackwardThreads>(d_out, threadIdx.x, [&](int row) -> const T* {
      if (first + row >= rows.count) return nullptr;
      return static_cast<const T*>(p.d_out) + rows.offset(first + row, p.heads * D, D);
    });
  }
  template <int kRows>
  __device__ __forceinline__ void copy_keys(SharedTile<T, D> k, SharedTile<T, D> v,
                                            int first) const {
    copy_rows<kRows, kBackwardThreads>(k, threadIdx.x, [&](int row) -> const T* {
      if (first + row >= keys) return nullptr;
      return static_cast<const T*>(p.k) + (first_token + first + row) * p.stride_k_token +
             kv_head * p.stride_k_head;
    });
    copy_rows<kRows, kBackwardThreads>(v, threadIdx.x, [&](int row) -> const T* {
      if (first + row >= keys) return nullptr;
      return static_cast<const T*>(p.v) + (first_token + first + row) * p.stride_v_token +
             kv_head * p.stride_v_head;
    });
  }

  // The index of a query row in p.lse and p.delta.
  __device__ __forceinline__ int64_t statistic(int row) const {
    return rows.offset(row, p.heads, 1);
  }
};

// The probabilities of two neighbouring scores, and the gradients of the two scores. Each pair is
// packed as an operand of the next product.
template <class T>
struct Differentiated {
  uint32_t probabilities, d_scores;

  // `scale` is p.scale * log2(e), and `lse` is a logarithm to base 2, because the exponentials are
  // computed as powers of two. d_scores lacks the factor p.scale. The sums of its products, d_q and
  // d_k, are multiplied by it when they are stored.
  __device__ __forceinline__ Differentiated(float2 scores, float2 d_probabilities, float scale,
                                            float2 lse, float2 delta) {
    const float low = exp2_approx(scores.x * scale - lse.x);
    const float high = exp2_approx(scores.y * scale - lse.y);
    probabilities = pack<T>(low, high);
    d_scores = pack<T>(low * (d_probabilities.x - delta.x), high * (d_probabilities.y - delta.y));
  }
};

}  // namespace mistral::cuda

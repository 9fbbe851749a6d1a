// The gradients of queries.
//
// Grid: (tiles of query rows, Hkv). A block owns 64 query rows of one sequence and key/value head.
// It goes through the keys that any of these rows sees, as prefill does.
#pragma once

#include "backward_tile.cuh"

namespace mistral::cuda {

template <class T, int D>
struct QueryGradients {
  static constexpr int kColumns = kWalkedRows / 8;

  const BackwardHead<T, D>& head;
  const BackwardShared<T, D>& shared;
  int first_row;

  // Goes through the keys and adds d_scores k to d_q. The factor p.scale comes in `store`.
  __device__ __forceinline__ void walk(float (&d_q)[1][D / 8][4]) const {
    const int warp_row = 16 * (threadIdx.x / kWarp), window = short_window(head.p.window);
    const int last_row = static_cast<int>(min(first_row + kOwnRows, head.rows.count)) - 1;
    const int first_query = head.rows.token(first_row), last_query = head.rows.token(last_row);
    int key = static_cast<int>(window_begin(first_query, window)), stage = 0;
    head.template copy_queries<kOwnRows>(shared.own(0), shared.own(1), first_row);
    copy_step(key, 0);

    // A lane has two rows. A row past the last one is treated as the last row, so that nothing is
    // read out of bounds. It is not stored.
    int own[2];
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row =
          static_cast<int>(min(first_row + warp_row + 8 * r + threadIdx.x % kWarp / 4, last_row));
      own[r] = head.rows.token(row);
      lse[r] = load_global(head.p.lse + head.statistic(row)) * kLog2e;
      delta[r] = load_global(head.p.delta + head.statistic(row));
    }
    const float scale = head.p.scale * kLog2e;
    for (; key <= last_query; key += kWalkedRows, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has arrived; no warp uses the other stage any more
      if (key + kWalkedRows <= last_query) copy_step(key + kWalkedRows, stage ^ 1);

      float scores[1][kColumns][4], d_probabilities[1][kColumns][4];
      multiply_keys(scores, shared.own(0), warp_row, shared.walked(stage, 0));
      multiply_keys(d_probabilities, shared.own(1), warp_row, shared.walked(stage, 1));
      if (any_hidden(first_query, last_query, key, key + kWalkedRows - 1, window)) {
        mask(scores, own, key, window);
      }
      uint32_t d_scores[1][kColumns][2];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Differentiated<T> pair(
              {scores[0][n][2 * r], scores[0][n][2 * r + 1]},
              {d_probabilities[0][n][2 * r], d_probabilities[0][n][2 * r + 1]}, scale,
              {lse[r], lse[r]}, {delta[r], delta[r]});
          d_scores[0][n][r] = pair.d_scores;
        }
      }
      multiply_values(d_q, d_scores, shared.walked(stage, 0));
    }
  }

  // Stores the results by way of the block's tile of queries in shared memory (store_rows). A warp
  // overwrites only rows that no other warp reads, so no barrier is needed.
  __device__ __forceinline__ void store(const float (&d_q)[1][D / 8][4]) const {
    store_rows(
        shared.own(0), 16 * (threadIdx.x / kWarp), d_q, [&](int) { return head.p.scale; },
        [&](int row) -> T* {
          if (first_row + row >= head.rows.count) return nullptr;
          return static_cast<T*>(head.p.d_q) +
                 head.rows.offset(first_row + row, head.p.heads * D, D);
        });
  }

 private:
  // Starts the copy of keys and values into a stage.
  __device__ __forceinline__ void copy_step(int first_key, int stage) const {
    head.template copy_keys<kWalkedRows>(shared.walked(stage, 0), shared.walked(stage, 1),
                                         first_key);
    cp_async_commit();
  }
};

template <class T, int D>
__global__ __launch_bounds__(kBackwardThreads) void attention_backward_queries(
    const __grid_constant__ AttentionBackwardParams p) {
  const int64_t group = p.heads / p.kv_heads;
  // The last tiles see the most keys, so the blocks that start first take them.
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const int64_t index = sequence_of_tile<kOwnRows>(p, group, tile);
  const Sequence s = p.sequences[index];
  const BackwardHead<T, D> head(p, s, blockIdx.y);
  const int first_row =
      static_cast<int>(tile - first_tile<kOwnRows>(s.first_token, group, index)) * kOwnRows;
  if (first_row >= head.rows.count) return;
  const BackwardShared<T, D> shared = {dynamic_shared<T>()};
  const QueryGradients<T, D> block = {head, shared, first_row};
  float d_q[1][D / 8][4] = {};
  block.walk(d_q);
  block.store(d_q);
}

}  // namespace mistral::cuda

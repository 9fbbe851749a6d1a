// The gradients of keys and values.
//
// Grid: (tiles of keys, Hkv). A block owns 64 keys of one sequence and key/value head. It goes
// through the query rows (rows.cuh) that see any of these keys, in all heads that share the
// key/value head. So no two blocks add to the same sum. Scores are computed transposed (a row is a
// key, a column is a query row), because the products that give the gradients need them so.
#pragma once

#include "backward_tile.cuh"

namespace mistral::cuda {

template <class T, int D>
struct KeyGradients {
  static constexpr int kColumns = kWalkedRows / 8;

  const BackwardHead<T, D>& head;
  const BackwardShared<T, D>& shared;
  int first_key;

  // Goes through the query rows. Adds probabilities^T d_out to d_v, and d_scores^T q to d_k. The
  // factor p.scale of d_k comes in `store`.
  __device__ __forceinline__ void walk(float (&d_k)[1][D / 8][4], float (&d_v)[1][D / 8][4]) const {
    const int warp_row = 16 * (threadIdx.x / kWarp), group = head.rows.group;
    const int window = short_window(head.p.window);
    const int last_key = static_cast<int>(min(first_key + kOwnRows, head.keys)) - 1;
    const int end = static_cast<int>(min(window_end(last_key, window), head.keys)) * group;
    int row = first_key * group, stage = 0;
    head.template copy_keys<kOwnRows>(shared.own(0), shared.own(1), first_key);
    copy_step(row, 0);
    for (; row < end; row += kWalkedRows, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has arrived; no warp uses the other stage any more
      if (row + kWalkedRows < end) copy_step(row + kWalkedRows, stage ^ 1);

      float scores[1][kColumns][4], d_probabilities[1][kColumns][4];
      multiply_keys(scores, shared.own(0), warp_row, shared.walked(stage, 0));
      multiply_keys(d_probabilities, shared.own(1), warp_row, shared.walked(stage, 1));
      const int first_query = row / group, last_query = (row + kWalkedRows - 1) / group;
      if (any_hidden(first_query, last_query, first_key, first_key + kOwnRows - 1, window)) {
        hide(scores, row, first_key + warp_row, window);
      }
      uint32_t probabilities[1][kColumns][2], d_scores[1][kColumns][2];
      differentiate(scores, d_probabilities, stage, probabilities, d_scores);
      multiply_values(d_v, probabilities, shared.walked(stage, 1));
      multiply_values(d_k, d_scores, shared.walked(stage, 0));
    }
  }

  // Stores the results by way of the block's own tiles in shared memory (store_rows). A warp
  // overwrites only rows that no other warp reads, so no barrier is needed.
  __device__ __forceinline__ void store(const float (&d_k)[1][D / 8][4],
                                        const float (&d_v)[1][D / 8][4]) const {
    const int warp_row = 16 * (threadIdx.x / kWarp);
    const auto row_of = [&](void* gradient) {
      return [this, gradient](int row) -> T* {
        if (first_key + row >= head.keys) return nullptr;
        const int64_t token = head.first_token + first_key + row;
        return static_cast<T*>(gradient) + (token * head.p.kv_heads + head.kv_head) * D;
      };
    };
    store_rows(shared.own(0), warp_row, d_k, [&](int) { return head.p.scale; }, row_of(head.p.d_k));
    store_rows(shared.own(1), warp_row, d_v, [](int) { return 1.0f; }, row_of(head.p.d_v));
  }

 private:
  // Starts the copy of query rows, with their d_out, lse and delta, into a stage.
  __device__ __forceinline__ void copy_step(int first_row, int stage) const {
    head.template copy_queries<kWalkedRows>(shared.walked(stage, 0), shared.walked(stage, 1),
                                            first_row);
    const int thread = threadIdx.x, row = first_row + thread % kWalkedRows;
    if (thread < 2 * kWalkedRows) {
      const float* const from = thread < kWalkedRows ? head.p.lse : head.p.delta;
      const bool valid = row < head.rows.count;
      cp_async_4(shared.lse(stage) + thread, valid ? from + head.statistic(row) : from,
                 valid ? 4 : 0);
    }
    cp_async_commit();
  }

  // If a query row does not see a key, sets their score to -inf. `first_row` is the first query row
  // of the tile, and `key` is the first key of the warp.
  __device__ __forceinline__ void hide(float (&scores)[1][kColumns][4], int first_row, int key,
                                       int window) const {
    const int lane = threadIdx.x % kWarp, group = head.rows.group;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = (first_row + 8 * n + 2 * (lane % 4) + j) / group;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own = key + 8 * half + lane / 4;
          if (is_hidden(query, own, window)) scores[0][n][2 * half + j] = -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void differentiate(const float (&scores)[1][kColumns][4],
                                                const float (&d_probabilities)[1][kColumns][4],
                                                int stage,
                                                uint32_t (&probabilities)[1][kColumns][2],
                                                uint32_t (&d_scores)[1][kColumns][2]) const {
    const int lane = threadIdx.x % kWarp;
    const float scale = head.p.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = 8 * n + 2 * (lane % 4);
      const float2 lse = load_shared_pair(shared.lse(stage) + column);
      const float2 delta = load_shared_pair(shared.delta(stage) + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * half;
        const Differentiated<T> pair({scores[0][n][i], scores[0][n][i + 1]},
                                     {d_probabilities[0][n][i], d_probabilities[0][n][i + 1]},
                                     scale, {lse.x * kLog2e, lse.y * kLog2e}, delta);
        probabilities[0][n][half] = pair.probabilities;
        d_scores[0][n][half] = pair.d_scores;
      }
    }
  }

  __device__ __forceinline__ static float2 load_shared_pair(const float* shared) {
    const uint2 bits = ld_shared_8(shared);
    return {__uint_as_float(bits.x), __uint_as_float(bits.y)};
  }
};

template <class T, int D>
__global__ __launch_bounds__(kBackwardThreads) void attention_backward_keys(
    const __grid_constant__ AttentionBackwardParams p) {
  const int64_t index = sequence_of_tile<kOwnRows>(p, 1, blockIdx.x);
  const Sequence s = p.sequences[index];
  const int first_key =
      static_cast<int>(blockIdx.x - first_tile<kOwnRows>(s.first_token, 1, index)) * kOwnRows;
  if (first_key >= s.count) return;
  const BackwardHead<T, D> head(p, s, blockIdx.y);
  const BackwardShared<T, D> shared = {dynamic_shared<T>()};
  const KeyGradients<T, D> block = {head, shared, first_key};
  float d_k[1][D / 8][4] = {}, d_v[1][D / 8][4] = {};
  block.walk(d_k, d_v);
  block.store(d_k, d_v);
}

}  // namespace mistral::cuda

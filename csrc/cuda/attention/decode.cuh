// Decode has few queries and many keys. The time to load keys and values limits its speed, so each
// is loaded once.
//
// The keys of one sequence and key/value head are divided into splits. Grid: (splits, Hkv, S). A
// block owns one split. It has at most 16 query rows: all heads of the group, for one token or a
// few. These rows together are one operand of the products, so that one load of a key serves all of
// them.
//
// The 4 warps of a block take tiles of 16 keys in turn. Each warp has two stages of its own in
// shared memory. One is filled while the warp works on the other. Because no stage is shared, the
// warps need no barrier of the block while they go through the keys. If there are several splits,
// each block writes its result to `partials`, and the last block to finish merges the results.
#pragma once

#include "finish.cuh"
#include "merge.cuh"
#include "tile_sm80.cuh"

namespace mistral::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeKeys = 16;
constexpr int kDecodeStages = 2;

// The number of elements in the stages of a warp. A stage has a tile of keys and a tile of values.
template <int D>
constexpr int kDecodeWarpShared = kDecodeStages * 2 * kDecodeKeys * D;
// The size of shared memory in bytes: the queries, then the stages of each warp.
template <class T, int D>
constexpr size_t kDecodeShared = (kDecodeRows + kDecodeWarps * kDecodeWarpShared<1>)*D * sizeof(T);

// The work of a block: one sequence, key/value head and split. Its phases are walk_keys,
// merge_warps and merge_splits, in this order.
template <class T, int D>
struct DecodeBlock {
  static constexpr int kThreads = kDecodeWarps * kWarp;

  const AttentionParams& p;
  const Sequence& s;
  const QueryRows& rows;
  int kv_head, split, splits;
  SharedTile<T, D> q_tile;

  // Attends to the keys of the block. Each warp takes every fourth tile, and at the end writes its
  // result over its stages.
  __device__ __forceinline__ void walk_keys() const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    T* const stages = stages_of(warp);
    const auto k_tile = [&](int stage) {
      return SharedTile<T, D>{stages + 2 * stage * kDecodeKeys * D};
    };
    const auto v_tile = [&](int stage) {
      return SharedTile<T, D>{stages + (2 * stage + 1) * kDecodeKeys * D};
    };

    const int64_t begin = window_begin(s.position, p.window);
    const VisibleKeys keys(s, kv_head, begin, s.position + s.count);
    const int window = short_window(p.window);
    const auto tiles = static_cast<int>(ceil_div(keys.count, kDecodeKeys));
    const int first_tile = static_cast<int>(int64_t{tiles} * split / splits);
    const int end_tile = static_cast<int>(int64_t{tiles} * (split + 1) / splits);

    const auto copy_tile = [&](int tile, int stage) {
      const int first = tile * kDecodeKeys;
      if (tile < end_tile) {
        copy_rows<kDecodeKeys, kWarp>(
            k_tile(stage), lane, [&](int row) { return keys.template k<T, D>(p, first + row); });
        copy_rows<kDecodeKeys, kWarp>(
            v_tile(stage), lane, [&](int row) { return keys.template v<T, D>(p, first + row); });
      }
      cp_async_commit();
    };

    copy_rows<kDecodeRows, kThreads>(q_tile, threadIdx.x, [&](int row) -> const T* {
      if (row >= rows.count) return nullptr;
      return static_cast<const T*>(p.q) + rows.offset(row, p.stride_q_token, p.stride_q_head);
    });
    copy_tile(first_tile + warp, 0);
    copy_tile(first_tile + warp + kDecodeWarps, 1);
    cp_async_wait<1>();
    __syncthreads();  // the queries have arrived

    // For each of this lane's two query rows, the offset of the row's own token among the keys. A
    // row past the last one is treated as the last row, and is not stored.
    int own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = static_cast<int>(min(8 * r + lane / 4, rows.count - 1));
      own[r] = static_cast<int>(s.position - begin) + rows.token(row);
    }
    const int first_own = static_cast<int>(s.position - begin), last_own = keys.count - 1;

    float out[1][D / 8][4] = {};
    Softmax<1> softmax(p.scale * kLog2e);
    int stage = 0;
    for (int tile = first_tile + warp; tile < end_tile; tile += kDecodeWarps) {
      cp_async_wait<1>();
      __syncwarp();  // the copies of all lanes have arrived

      float scores[1][kDecodeKeys / 8][4];
      multiply_keys(scores, q_tile, 0, k_tile(stage));
      const int first = tile * kDecodeKeys;
      if (any_hidden(first_own, last_own, first, first + kDecodeKeys - 1, window)) {
        mask(scores, own, first, window);
      }
      uint32_t probabilities[1][kDecodeKeys / 8][2];
      softmax.fold<T>(scores, probabilities, out);
      multiply_values(out, probabilities, v_tile(stage));
      __syncwarp();  // no lane uses this stage any more, so it may be filled again
      copy_tile(tile + kDecodeStages * kDecodeWarps, stage);
      stage ^= 1;
    }
    cp_async_wait<0>();
    __syncwarp();
    store_result_of_warp(out[0], softmax);
    __syncthreads();
  }

  // Merges the results of the warps. Writes the merged rows to the output, or to `partials` if
  // there are several splits.
  __device__ __forceinline__ void merge_warps() const {
    for_each_item([&](int row, int d) {
      const Merged merged = merge<D>(
          kDecodeWarps, d, p.scale * kLog2e,
          [&](int warp) { return result_of(warp) + row * kPartialRow<D>; },
          [](const float* shared) { return load_shared16(shared); });
      if (splits == 1) {
        store(row, d, merged);
        return;
      }
      float* partial = partial_of(split) + row * kPartialRow<D>;
      store16(partial + d,
              Vec16<float>{{merged.sums[0], merged.sums[1], merged.sums[2], merged.sums[3]}});
      store16(partial + d + 4,
              Vec16<float>{{merged.sums[4], merged.sums[5], merged.sums[6], merged.sums[7]}});
      if (d == 0) store16(partial + D, Vec16<float>{{merged.maximum, merged.total, 0.0f, 0.0f}});
    });
  }

  // Merges the partial results of all splits into the output. The last block to finish calls this.
  __device__ __forceinline__ void merge_splits() const {
    for_each_item([&](int row, int d) {
      const Merged merged = merge<D>(
          splits, d, p.scale * kLog2e,
          [&](int part) { return partial_of(part) + row * kPartialRow<D>; },
          [](const float* global) { return load16(global); });
      store(row, d, merged);
    });
  }

  // The index of this key/value head among the key/value heads of all sequences.
  __device__ __forceinline__ int64_t head() const {
    return int64_t{blockIdx.z} * p.kv_heads + kv_head;
  }

 private:
  __device__ __forceinline__ void store(int row, int d, const Merged& merged) const {
    store_result<T, D>(p, rows, row, d, merged);
    if (p.lse && d == 0) store_lse(p, rows, row, merged.maximum, merged.total);
  }

  // The stages of a warp. After walk_keys they hold the result of the warp.
  __device__ __forceinline__ T* stages_of(int warp) const {
    return q_tile.elements + kDecodeRows * D + warp * kDecodeWarpShared<D>;
  }
  __device__ __forceinline__ float* result_of(int warp) const {
    return reinterpret_cast<float*>(stages_of(warp));
  }
  __device__ __forceinline__ void store_result_of_warp(const float (&out)[D / 8][4],
                                                       const Softmax<1>& softmax) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* row = result_of(threadIdx.x / kWarp) + (8 * r + lane / 4) * kPartialRow<D>;
      const float total = row_sum(softmax.total[r]);
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        row[8 * d + 2 * (lane % 4)] = out[d][2 * r];
        row[8 * d + 2 * (lane % 4) + 1] = out[d][2 * r + 1];
      }
      if (lane % 4 == 0) {
        row[D] = softmax.maximum[r];
        row[D + 1] = total;
      }
    }
  }
  __device__ __forceinline__ float* partial_of(int part) const {
    return p.partials + (head() * splits + part) * kDecodeRows * kPartialRow<D>;
  }
  // Calls f(row, d) for each query row and each multiple d of 8 below D. Such a call is for
  // elements d to d + 7 of the row. The threads of the block share the calls.
  template <class F>
  __device__ __forceinline__ void for_each_item(const F& f) const {
    for (int item = threadIdx.x; item < rows.count * D / 8; item += kThreads) {
      f(item / (D / 8), item % (D / 8) * 8);
    }
  }
};

template <class T, int D>
__global__ __launch_bounds__(kDecodeWarps* kWarp,
                             3) void attention_decode(const __grid_constant__ AttentionParams p) {
  wait_for_earlier_kernels();
  let_later_kernels_begin();
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y;
  const Sequence s = p.sequences[blockIdx.z];
  const QueryRows rows(p, s, kv_head);
  if (rows.count == 0 || !is_decode(s.count, rows.group)) return;

  const DecodeBlock<T, D> block = {p, s, rows, kv_head, split, splits, {dynamic_shared<T>()}};
  block.walk_keys();
  block.merge_warps();

  const bool late = has_late_tokens(p, s);
  if (splits == 1 ? !late : !arrives_last(p.counters + block.head(), splits)) return;
  if (splits > 1) block.merge_splits();
  if (late) append_late<T, D>(p, s, kv_head, threadIdx.x, blockDim.x);
}

}  // namespace mistral::cuda

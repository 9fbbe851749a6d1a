// Prefill: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over a ring.
//
// Grid: (tiles of query rows, Hkv). A block of 4 warps owns 128 query rows of one sequence and
// key/value head. Each warp owns 32 of these rows. The block goes through the keys that any of its
// rows sees, in tiles of 64. It copies the values of a tile while it multiplies the keys of the
// tile. It copies the keys of the next tile while it multiplies the values. Tiles of keys outside
// the window are not loaded. Only the tiles at the two edges of the window are masked.
#pragma once

#include "finish.cuh"
#include "merge.cuh"
#include "tile_sm80.cuh"

namespace mistral::cuda {

constexpr int kPrefillWarps = 4;
static_assert(kPrefillRows == 32 * kPrefillWarps);
constexpr int kPrefillKeys = 64;

// The size of shared memory in bytes: queries, keys, values, and the VisibleKeys of the block.
template <class T, int D>
constexpr size_t kPrefillShared =
    (kPrefillRows + 2 * kPrefillKeys) * D * sizeof(T) + sizeof(VisibleKeys);

// The work of a block: a tile of query rows of one sequence and key/value head. Its phases are
// load, walk_keys and store, in this order.
template <class T, int D>
struct PrefillBlock {
  static constexpr int kThreads = kPrefillWarps * kWarp;

  const AttentionParams& p;
  const Sequence& s;
  const QueryRows& rows;
  VisibleKeys& keys;  // in shared memory
  SharedTile<T, D> q_tile, k_tile, v_tile;
  int64_t begin;           // the position of the first key that the tile sees
  int tile_row, last_row;  // the first and the last row of the tile, as indices into `rows`
  int warp_row, lane;      // warp_row: the first of this warp's rows, counted within the tile

  // Starts the copies of the queries and of the first keys.
  __device__ __forceinline__ void load() const {
    copy_rows<kPrefillRows, kThreads>(q_tile, threadIdx.x, [&](int row) -> const T* {
      if (tile_row + row > last_row) return nullptr;
      return static_cast<const T*>(p.q) +
             rows.offset(tile_row + row, p.stride_q_token, p.stride_q_head);
    });
    copy_keys(0);
  }

  // Attends to the `count` keys that the tile sees. Each warp sums the unnormalised results of its
  // rows in `out`.
  __device__ __forceinline__ void walk_keys(int count, float (&out)[2][D / 8][4],
                                            Softmax<2>& softmax) const {
    const int first_own = offset_of(0), last_own = count - 1, window = short_window(p.window);
    for (int first = 0; first < count; first += kPrefillKeys) {
      cp_async_wait<0>();
      __syncthreads();  // the keys have arrived; no warp uses the values of the previous tile
      copy_values(first);

      float scores[2][kPrefillKeys / 8][4];
      multiply_keys(scores, q_tile, warp_row, k_tile);
      if (any_hidden(first_own, last_own, first, first + kPrefillKeys - 1, window)) {
        int own[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) own[r] = offset_of(lane_row(r));
        mask(scores, own, first, window);
      }
      uint32_t probabilities[2][kPrefillKeys / 8][2];
      softmax.fold<T>(scores, probabilities, out);

      cp_async_wait<0>();
      __syncthreads();  // the values have arrived; no warp uses the keys any more
      if (first + kPrefillKeys < count) copy_keys(first + kPrefillKeys);
      multiply_values(out, probabilities, v_tile);
    }
  }

  // Stores the results of each warp's rows, through the same rows of q_tile. No other warp reads
  // these rows of q_tile, so the warp may overwrite them without a barrier.
  __device__ __forceinline__ void store(float (&out)[2][D / 8][4],
                                        const Softmax<2>& softmax) const {
    const auto factor_of = [&](int r) { return softmax.inverse_total(r); };
    store_rows(q_tile, warp_row, out, factor_of, [&](int row) -> T* {
      if (tile_row + row > last_row) return nullptr;
      return static_cast<T*>(p.out) +
             rows.offset(tile_row + row, p.stride_out_token, p.stride_out_head);
    });
    if (!p.lse) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = tile_row + lane_row(r);
      const float total = row_sum(softmax.total[r]);
      if (lane % 4 == 0 && row <= last_row) store_lse(p, rows, row, softmax.maximum[r], total);
    }
  }

 private:
  // The index within the tile of row r, 0 to 3, of this lane.
  __device__ __forceinline__ int lane_row(int r) const { return warp_row + 8 * r + lane / 4; }

  // The offset of a query row's own token among the keys. `row` counts within the tile. A row past
  // the last one is treated as the last row, and is not stored.
  __device__ __forceinline__ int offset_of(int row) const {
    return static_cast<int>(s.position + rows.token(min(tile_row + row, last_row)) - begin);
  }

  __device__ __forceinline__ void copy_keys(int first) const {
    copy_rows<kPrefillKeys, kThreads>(
        k_tile, threadIdx.x, [&](int row) { return keys.template k<T, D>(p, first + row); });
    cp_async_commit();
  }
  __device__ __forceinline__ void copy_values(int first) const {
    copy_rows<kPrefillKeys, kThreads>(
        v_tile, threadIdx.x, [&](int row) { return keys.template v<T, D>(p, first + row); });
    cp_async_commit();
  }
};

template <class T, int D>
__global__ __launch_bounds__(kPrefillWarps* kWarp) void attention_prefill(
    const __grid_constant__ AttentionParams p) {
  const int kv_head = blockIdx.y;
  const int64_t group = p.heads / p.kv_heads;
  // The last tiles see the most keys, so the blocks that start first take them.
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const int64_t index = sequence_of_tile(p, group, tile);
  const Sequence s = p.sequences[index];
  const QueryRows rows(p, s, kv_head);
  const int tile_row =
      static_cast<int>(tile - first_tile(s.first_token, group, index)) * kPrefillRows;
  if (tile_row >= rows.count || is_decode(s.count, group)) return;

  const SharedTile<T, D> q_tile = {dynamic_shared<T>()};
  const SharedTile<T, D> k_tile = {q_tile.elements + kPrefillRows * D};
  const SharedTile<T, D> v_tile = {k_tile.elements + kPrefillKeys * D};
  auto& keys = *reinterpret_cast<VisibleKeys*>(v_tile.elements + kPrefillKeys * D);
  const int last_row = static_cast<int>(min(tile_row + kPrefillRows, rows.count)) - 1;
  const int64_t begin = window_begin(s.position + rows.token(tile_row), p.window);
  const int64_t end = s.position + rows.token(last_row) + 1;
  if (threadIdx.x == 0) keys = VisibleKeys(s, kv_head, begin, end);
  __syncthreads();

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const PrefillBlock<T, D> block = {p,      s,     rows,     keys,     q_tile,    k_tile,
                                    v_tile, begin, tile_row, last_row, 32 * warp, lane};
  float out[2][D / 8][4] = {};
  Softmax<2> softmax(p.scale * kLog2e);
  const int count = keys.count;
  block.load();
  block.walk_keys(count, out, softmax);
  block.store(out, softmax);

  if (has_late_tokens(p, s)) {
    const auto blocks = static_cast<int>(ceil_div(rows.count, kPrefillRows));
    if (arrives_last(p.counters + index * p.kv_heads + kv_head, blocks)) {
      append_late<T, D>(p, s, kv_head, threadIdx.x, blockDim.x);
    }
  }
}

}  // namespace mistral::cuda

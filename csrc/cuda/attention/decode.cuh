// Decode: few queries, many keys, limited by reading the cache once.
//
// Grid: (splits, Hkv, S). The query rows of one sequence and key/value head, at most 16 (all heads
// of the group for 1 token, or for a few), are one operand of the products, so each key and value
// is loaded once for all of them. The keys that they see are divided among `splits` blocks and in a
// block among 4 warps, which take tiles of 16 in turn. Each warp has two stages of shared memory of
// its own, fills both before it begins, and then works on one while the other is on its way: so the
// block needs no barrier until the results of its warps are merged. With several splits each block
// leaves its result in `partials`, and the last one to arrive merges them.
#pragma once

#include "finish.cuh"
#include "merge.cuh"
#include "tile_sm80.cuh"

namespace mistral::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeKeys = 16;
constexpr int kDecodeStages = 2;

// Elements of a warp's stages of keys and values.
template <int D>
constexpr int kDecodeWarpShared = kDecodeStages * 2 * kDecodeKeys * D;
// Bytes of shared memory: queries, then the stages of one warp after the other.
template <class T, int D>
constexpr size_t kDecodeShared = (kDecodeRows + kDecodeWarps * kDecodeWarpShared<1>)*D * sizeof(T);

template <class T, int D>
__global__ __launch_bounds__(kDecodeWarps* kWarp,
                             3) void attention_decode(const __grid_constant__ AttentionParams p) {
  wait_for_earlier_kernels();
  let_later_kernels_begin();
  constexpr int kThreads = kDecodeWarps * kWarp;
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, index = blockIdx.z;
  const Sequence s = p.sequences[index];
  const QueryRows rows(p, s, kv_head);
  if (rows.count == 0 || !is_decode(s.count, rows.group)) return;

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const SharedTile<T, D> q_tile = {dynamic_shared<T>()};
  T* const stages = q_tile.elements + kDecodeRows * D + warp * kDecodeWarpShared<D>;
  const auto k_tile = [&](int stage) {
    return SharedTile<T, D>{stages + 2 * stage * kDecodeKeys * D};
  };
  const auto v_tile = [&](int stage) {
    return SharedTile<T, D>{stages + (2 * stage + 1) * kDecodeKeys * D};
  };

  const int64_t begin = window_begin(s.position, p.window);
  const VisibleKeys keys(s, kv_head, begin, s.position + s.count);
  const int window = window_of(p), tiles = static_cast<int>(ceil_div(keys.count, kDecodeKeys));
  const int first_tile = static_cast<int>(int64_t{tiles} * split / splits);
  const int end_tile = static_cast<int>(int64_t{tiles} * (split + 1) / splits);

  const auto copy_tile = [&](int tile, int stage) {
    const int first = tile * kDecodeKeys;
    if (tile < end_tile) {
      copy_rows<kDecodeKeys, kWarp>(k_tile(stage), lane,
                                    [&](int row) { return keys.template k<T, D>(p, first + row); });
      copy_rows<kDecodeKeys, kWarp>(v_tile(stage), lane,
                                    [&](int row) { return keys.template v<T, D>(p, first + row); });
    }
    cp_async_commit();
  };

  copy_rows<kDecodeRows, kThreads>(q_tile, thread, [&](int row) -> const T* {
    if (row >= rows.count) return nullptr;
    return static_cast<const T*>(p.q) + rows.offset(row, p.stride_q_token, p.stride_q_head);
  });
  copy_tile(first_tile + warp, 0);
  copy_tile(first_tile + warp + kDecodeWarps, 1);
  cp_async_wait<1>();
  __syncthreads();  // the queries are there, for all warps

  // Offsets of this lane's two rows. Rows past the end repeat the last row and are not stored.
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
    __syncwarp();  // all lanes' copies of this tile are there

    float scores[1][kDecodeKeys / 8][4];
    multiply_keys(scores, q_tile, 0, k_tile(stage));
    const int first = tile * kDecodeKeys;
    if (first + kDecodeKeys - 1 > first_own || first <= last_own - window) {
      mask(scores, own, first, window);
    }
    uint32_t probabilities[1][kDecodeKeys / 8][2];
    softmax.fold<T>(scores, probabilities, out);
    multiply_values(out, probabilities, v_tile(stage));
    __syncwarp();  // all lanes are done with this stage, before it is filled again
    copy_tile(tile + kDecodeStages * kDecodeWarps, stage);
    stage ^= 1;
  }
  cp_async_wait<0>();
  __syncwarp();

  // Merge the warps, each of which leaves its result where its stages were.
  const auto result_of = [&](int w) {
    return reinterpret_cast<float*>(q_tile.elements + kDecodeRows * D + w * kDecodeWarpShared<D>);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* row = result_of(warp) + (8 * r + lane / 4) * kPartialRow<D>;
    const float total = row_sum(softmax.total[r]);
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      row[8 * d + 2 * (lane % 4)] = out[0][d][2 * r];
      row[8 * d + 2 * (lane % 4) + 1] = out[0][d][2 * r + 1];
    }
    if (lane % 4 == 0) {
      row[D] = softmax.maximum[r];
      row[D + 1] = total;
    }
  }
  __syncthreads();

  const int64_t head = int64_t{index} * p.kv_heads + kv_head;
  const auto partial_of = [&](int part) {
    return p.partials + (head * splits + part) * kDecodeRows * kPartialRow<D>;
  };
  for (int item = thread; item < rows.count * D / 8; item += kThreads) {
    const int row = item / (D / 8), d = item % (D / 8) * 8;
    const Merged merged = merge<D>(
        kDecodeWarps, d, softmax.scale, [&](int w) { return result_of(w) + row * kPartialRow<D>; },
        [](const float* shared) { return load_shared16(shared); });
    if (splits == 1) {
      store_result<T, D>(p, rows, row, d, merged);
      continue;
    }
    float* partial = partial_of(split) + row * kPartialRow<D>;
    store16(partial + d,
            Vec16<float>{{merged.sums[0], merged.sums[1], merged.sums[2], merged.sums[3]}});
    store16(partial + d + 4,
            Vec16<float>{{merged.sums[4], merged.sums[5], merged.sums[6], merged.sums[7]}});
    if (d == 0) store16(partial + D, Vec16<float>{{merged.maximum, merged.total, 0.0f, 0.0f}});
  }

  const bool late = has_late_tokens(p, s);
  if (splits == 1 ? !late : !arrives_last(p.counters + head, splits)) return;
  if (splits > 1) {
    for (int item = thread; item < rows.count * D / 8; item += kThreads) {
      const int row = item / (D / 8), d = item % (D / 8) * 8;
      const Merged merged = merge<D>(
          splits, d, softmax.scale,
          [&](int part) { return partial_of(part) + row * kPartialRow<D>; },
          [](const float* global) { return load16(global); });
      store_result<T, D>(p, rows, row, d, merged);
    }
  }
  if (late) append_late<T, D>(p, s, kv_head, threadIdx.x, blockDim.x);
}

}  // namespace mistral::cuda

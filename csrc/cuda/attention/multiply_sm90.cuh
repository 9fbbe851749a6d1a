// The consumers of prefill_sm90.cuh. A consumer is a warpgroup with 64 query rows. It multiplies
// these rows by the keys, computes the softmax in registers, and multiplies the probabilities by
// the values.
//
// The two consumers take turns to issue products. In its turn a consumer issues two: the queries by
// the keys of a tile, and the probabilities of the previous tile by that tile's values. As soon as
// the first is done, the consumer computes the softmax of its scores, while the second product and
// the other consumer's turn are under way.
#pragma once

#include "finish.cuh"
#include "merge.cuh"
#include "prefill_sm90.cuh"

namespace mistral::cuda {

// Views the registers of a wgmma product as the functions of tile_sm80.cuh expect them.
template <int kCount>
__device__ __forceinline__ auto& as_fragments(float (&product)[kCount]) {
  return reinterpret_cast<float (&)[1][kCount / 4][4]>(product);
}

// The descriptor of the address that lies `bytes` bytes after the address of `descriptor`.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + bytes / 16;
}

constexpr int kAtom = 1024;  // the bytes of an atom (wgmma_descriptor): 8 rows of 128 bytes

// Issues scores = q k^T, as one group of wgmma.
template <class T, int D>
__device__ __forceinline__ void issue_scores(float (&scores)[kHopperKeys / 2],
                                             SwizzledTile<T, D, kConsumerRows> q,
                                             SwizzledTile<T, D, kHopperKeys> k) {
  const uint64_t a = wgmma_descriptor(q.elements, 0, kAtom);
  const uint64_t b = wgmma_descriptor(k.elements, 0, kAtom);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {  // 16 dimensions at a time, which are 32 bytes
    const int column = step / 4, bytes = step % 4 * 32;
    wgmma_m64<T, kHopperKeys, false>(scores, advance(a, column * q.kColumn * 2 + bytes),
                                     advance(b, column * k.kColumn * 2 + bytes), step > 0);
  }
  wgmma_commit();
}

// Issues out += probabilities v, as one group of wgmma.
template <class T, int D>
__device__ __forceinline__ void issue_out(float (&out)[D / 2],
                                          uint32_t (&probabilities)[kHopperKeys / 16][4],
                                          SwizzledTile<T, D, kHopperKeys> v) {
  const uint64_t b = wgmma_descriptor(v.elements, v.kColumn * 2, kAtom);
  wgmma_settle(out);
  wgmma_settle(probabilities);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHopperKeys / 16; ++step) {  // 16 keys at a time, which are 2 atoms
    wgmma_m64<T, D, true>(out, probabilities[step], advance(b, step * 2 * kAtom), true);
  }
  wgmma_commit();
}

// Turns scores into probabilities relative to the new maximum of the row. The caller must then
// multiply what it has summed so far for row r of the lane by factors[r].
template <int kCount>
__device__ __forceinline__ void exponentiate(Softmax<1>& softmax, float (&scores)[kCount],
                                             float (&factors)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = softmax.maximum[r];
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) {
      highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
    }
    const auto [base, factor] = softmax.raise(r, row_max(highest));
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) {
      scores[i] = exp2_approx(scores[i] * softmax.scale - base);
      scores[i + 1] = exp2_approx(scores[i + 1] * softmax.scale - base);
      sum += scores[i] + scores[i + 1];
    }
    softmax.total[r] = softmax.total[r] * factor + sum;
    factors[r] = factor;
  }
}

template <int kCount>
__device__ __forceinline__ void rescale(float (&out)[kCount], const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= factors[i / 2 % 2];
}

// Packs probabilities as operands `a` of the product with the values. Each operand has 16 keys.
template <class T, int kCount>
__device__ __forceinline__ void pack_rows(const float (&scores)[kCount],
                                          uint32_t (&probabilities)[kCount / 8][4]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    probabilities[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }
}

// `number`, 0 or 1, says which of the block's two consumers this is.
template <class T, int D>
class Consumer {
 public:
  __device__ Consumer(const AttentionParams& p, HopperShared<T, D>& shared, int number)
      : p_(p), shared_(shared), number_(number) {}

  __device__ __forceinline__ void run() {
    if (number_ == 1) pass_turn();
    copy_queries(0);
    int before = 0;  // the number of key tiles of the earlier items
    for (int i = 0;; ++i) {
      const WorkItem& item = shared_.items[stage_of(i)];
      if (item.key_tiles == 0) break;
      cp_async_wait<0>();
      fence_proxy_async();  // makes the queries visible to wgmma
      sync();
      if (i > 0 && thread() == 0) mbarrier_arrive(&shared_.item_empty[stage_of(i - 1)]);
      multiply(item, before, i);
      before += item.key_tiles;
    }
    // Consumer 1 also gave consumer 0 a turn before its loop, so consumer 0 has been given one turn
    // that it has not taken. It takes that turn here, so that no arrival is left at the barrier.
    if (number_ == 0) await_turn();
  }

 private:
  __device__ __forceinline__ int thread() const { return threadIdx.x % kWarpgroup; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarp; }
  // The first of this warp's 16 rows, counted within the consumer's rows.
  __device__ __forceinline__ int warp_row() const { return thread() / kWarp * 16; }

  __device__ __forceinline__ void sync() const {
    named_barrier_sync(kConsumerBarrier + number_, kWarpgroup);
  }
  __device__ __forceinline__ void await_turn() const {
    named_barrier_sync(kTurnBarrier + number_, kConsumers * kWarpgroup);
  }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(kTurnBarrier + 1 - number_, kConsumers * kWarpgroup);
  }
  // Tells the producer that this warp does not use a stage any more.
  __device__ __forceinline__ void release(uint64_t* empty) const {
    if (lane() == 0) mbarrier_arrive(empty);
  }

  __device__ __forceinline__ SwizzledTile<T, D, kConsumerRows> q_tile() const {
    return {shared_.q[number_]};
  }

  // Starts the copy of the queries of item i.
  __device__ __forceinline__ void copy_queries(int i) const {
    mbarrier_wait(&shared_.item_full[stage_of(i)], parity_of(i));
    const WorkItem& item = shared_.items[stage_of(i)];
    if (item.key_tiles == 0) return;
    const QueryRows rows(p_, item.sequence, item.kv_head);
    const int first = item.row + number_ * kConsumerRows;
    copy_rows<kConsumerRows, kWarpgroup>(q_tile(), thread(), [&](int row) -> const T* {
      if (first + row >= item.end_row) return nullptr;
      return static_cast<const T*>(p_.q) +
             rows.offset(first + row, p_.stride_q_token, p_.stride_q_head);
    });
    cp_async_commit();
  }

  // Computes item number i. `before` is the number of key tiles of the earlier items.
  __device__ __forceinline__ void multiply(const WorkItem& item, int before, int i) {
    const QueryRows rows(p_, item.sequence, item.kv_head);
    const int first_row = item.row + number_ * kConsumerRows;
    // offset_of(row) is the offset of the row's own token among the keys. A row past the last one
    // is treated as the last row, and is not stored.
    const int own_first = static_cast<int>(item.keys.count) - 1 - rows.token(item.end_row - 1);
    const auto offset_of = [&](int row) {
      return own_first + rows.token(static_cast<int>(min(first_row + row, item.end_row - 1)));
    };
    const int first_own = offset_of(0), last_own = offset_of(kConsumerRows - 1);
    const int own[2] = {offset_of(warp_row() + lane() / 4), offset_of(warp_row() + 8 + lane() / 4)};
    const int window = short_window(p_.window), tiles = item.key_tiles;

    float scores[kHopperKeys / 2], out[D / 2] = {}, factors[2];
    uint32_t probabilities[kHopperKeys / 16][4];
    Softmax<1> softmax(p_.scale * kLog2e);
    const auto k_tile = [&](int use) {
      mbarrier_wait(&shared_.k_full[stage_of(use)], parity_of(use));
      return SwizzledTile<T, D, kHopperKeys>{shared_.k[stage_of(use)]};
    };
    const auto v_tile = [&](int use) {
      mbarrier_wait(&shared_.v_full[stage_of(use)], parity_of(use));
      return SwizzledTile<T, D, kHopperKeys>{shared_.v[stage_of(use)]};
    };
    const auto mask_tile = [&](int tile) {
      const int first = tile * kHopperKeys;
      if (any_hidden(first_own, last_own, first, first + kHopperKeys - 1, window)) {
        mask(as_fragments(scores), own, first, window);
      }
    };

    issue_scores(scores, q_tile(), k_tile(before));
    wgmma_wait<0>();
    wgmma_settle(scores);
    release(&shared_.k_empty[stage_of(before)]);
    mask_tile(item.first_key_tile);
    exponentiate(softmax, scores, factors);
    pack_rows<T>(scores, probabilities);
    for (int tile = 1; tile < tiles; ++tile) {
      const int use = before + tile;
      const auto k = k_tile(use);
      await_turn();
      issue_scores(scores, q_tile(), k);
      issue_out(out, probabilities, v_tile(use - 1));
      pass_turn();
      wgmma_wait<1>();
      wgmma_settle(scores);
      release(&shared_.k_empty[stage_of(use)]);
      mask_tile(item.first_key_tile + tile);
      exponentiate(softmax, scores, factors);
      wgmma_wait<0>();
      wgmma_settle(out);
      release(&shared_.v_empty[stage_of(use - 1)]);
      rescale(out, factors);
      pack_rows<T>(scores, probabilities);
    }
    const int last = before + tiles - 1;
    issue_out(out, probabilities, v_tile(last));
    sync();  // no warp uses the queries any more
    copy_queries(i + 1);
    wgmma_wait<0>();
    wgmma_settle(out);
    release(&shared_.v_empty[stage_of(last)]);

    const int64_t head = int64_t{item.index} * p_.kv_heads + item.kv_head;
    if (item.parts == 1) {
      store_out(item, rows, out, softmax);
    } else if (!merge_parts(item, rows, out, softmax)) {
      return;
    }
    if (has_late_tokens(p_, item.sequence)) {
      const auto parties = static_cast<int>(kConsumers * ceil_div(rows.count, kPrefillRows));
      if (arrives_last(p_.counters + head, parties, thread(), &shared_.last[number_],
                       [&] { sync(); })) {
        append_late<T, D>(p_, item.sequence, item.kv_head, thread(), kWarpgroup);
      }
    }
  }

  __device__ __forceinline__ void store_out(const WorkItem& item, const QueryRows& rows,
                                            float (&out)[D / 2], const Softmax<1>& softmax) {
    const SharedTile<T, D> tile = {shared_.out[number_]};
    const int first_row = item.row + number_ * kConsumerRows;
    const auto factor_of = [&](int r) { return softmax.inverse_total(r); };
    store_rows(tile, warp_row(), as_fragments(out), factor_of, [&](int row) -> T* {
      if (first_row + row >= item.end_row) return nullptr;
      return static_cast<T*>(p_.out) +
             rows.offset(first_row + row, p_.stride_out_token, p_.stride_out_head);
    });
  }

  // Writes the partial results of this warpgroup to `partials`. The last warpgroup that does so for
  // these rows merges all parts, stores the results and returns true. For the other warpgroups this
  // returns false.
  __device__ __forceinline__ bool merge_parts(const WorkItem& item, const QueryRows& rows,
                                              float (&out)[D / 2], const Softmax<1>& softmax) {
    const int64_t rows_before = int64_t{item.number} * kConsumers + number_;
    const auto partial_of = [&](int part) {
      return p_.partials +
             (rows_before * p_.prefill_splits + part) * kConsumerRows * kPartialRow<D>;
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const row = partial_of(item.part) + (warp_row() + 8 * r + lane() / 4) * kPartialRow<D>;
      const float total = row_sum(softmax.total[r]);
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        const float2 pair = {out[4 * d + 2 * r], out[4 * d + 2 * r + 1]};
        store_global(reinterpret_cast<float2*>(row + 8 * d + 2 * (lane() % 4)), pair);
      }
      if (lane() % 4 == 0) store16(row + D, Vec16<float>{{softmax.maximum[r], total, 0.0f, 0.0f}});
    }
    int32_t* const counter = p_.counters + p_.num_sequences * p_.kv_heads + 1 + rows_before;
    if (!arrives_last(counter, item.parts, thread(), &shared_.last[number_], [&] { sync(); })) {
      return false;
    }
    const int first_row = item.row + number_ * kConsumerRows;
    const int count = static_cast<int>(min(item.end_row - first_row, kConsumerRows));
    for (int i = thread(); i < count * D / 8; i += kWarpgroup) {
      const int row = i / (D / 8), d = i % (D / 8) * 8;
      const Merged merged = merge<D>(
          item.parts, d, softmax.scale,
          [&](int part) { return partial_of(part) + row * kPartialRow<D>; },
          [](const float* global) { return load16(global); });
      store_result<T, D>(p_, rows, first_row + row, d, merged);
    }
    return true;
  }

  const AttentionParams& p_;
  HopperShared<T, D>& shared_;
  const int number_;
};

}  // namespace mistral::cuda

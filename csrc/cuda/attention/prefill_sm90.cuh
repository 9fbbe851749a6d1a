// Prefill for sm_90a: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) over a ring.
//
// Grid: one block for each multiprocessor, or fewer if there is less work. A block takes one work
// item after the other. An item is a tile of 128 query rows of one sequence and key/value head, and
// the keys that any of these rows sees (or a part of them), in tiles of 128. Blocks claim items
// from a counter. The last tiles see the most keys, so they come first. Then the blocks end at
// about the same time.
//
// A block has three warpgroups. The first is the producer (this file). It claims the items, and
// fills two stages of keys and two stages of values. The other two warpgroups are the consumers
// (multiply_sm90.cuh), each with 64 query rows. While one consumer multiplies, the other computes
// its softmax.
#pragma once

#include <ptx_sm90.cuh>

#include "prefill_sm90.h"
#include "tile_sm80.cuh"

namespace mistral::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kHopperStages = 2;

// If a call has at most this many tokens, the keys and values of all its heads are assumed to fit
// in the L2 cache. The order of the work items depends on this (WorkQueue::next). In Mistral 7B
// the keys and values of 4096 tokens take 16 MB.
constexpr int kTokensInL2 = 4096;

// The number of registers of a thread after their redistribution. The consumers need more, because
// their scores and results are in registers. Every thread starts with 168, the most that three
// equal warpgroups can have. The redistribution must not change the total.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters == 3 * 168);

// The ids of the named barriers (ptx_sm90.cuh). The producer has one for its own threads. Consumer
// i has kConsumerBarrier + i for its own threads, and waits at kTurnBarrier + i for its turn to
// multiply.
constexpr int kProducerBarrier = 1, kConsumerBarrier = 2, kTurnBarrier = 4;

// A tile [kRows, D] in the layout that TMA writes and wgmma reads. The tile is cut into columns
// that are 64 elements wide, which lie one after the other. A row of a column has 128 bytes. In it,
// 16-byte chunk c is at place c ^ (row % 8).
template <class T, int D, int kRows>
struct SwizzledTile {
  static constexpr int kChunk = 8;  // elements of a chunk
  static constexpr int kChunks = D / kChunk;
  static constexpr int kColumns = D / 64;
  static constexpr int kColumn = 64 * kRows;  // elements of a column
  static constexpr int kBytes = kRows * D * sizeof(T);
  T* elements;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    return elements + c / 8 * kColumn + row * 64 + ((c ^ row) & 7) * kChunk;
  }
};

// A tile of query rows, and the tiles of keys to multiply it with. These are all tiles of keys that
// the query rows see, or one of several parts of them.
struct WorkItem {
  Sequence sequence;
  VisibleKeys keys;  // the keys that the query rows see, those of the other parts included
  int index;         // index of the sequence
  int kv_head;
  int number;          // index of the tile of query rows among those of all key/value heads
  int row;             // first row of the tile, as an index into QueryRows
  int end_row;         // the row after the last row of the tile
  int part, parts;     // the index of the part, and the number of parts
  int first_key_tile;  // first tile of keys of the part
  int key_tiles;       // number of tiles of keys of the part; 0: there is no more work
};

// The shared memory of a block.
template <class T, int D>
struct alignas(1024) HopperShared {
  T q[kConsumers][kConsumerRows * D];
  T k[kHopperStages][kHopperKeys * D];
  T v[kHopperStages][kHopperKeys * D];
  T out[kConsumers][kConsumerRows * D];
  // Barriers. Full: the producer has filled the stage. Empty: no warp of a consumer uses the stage
  // any more.
  uint64_t k_full[kHopperStages], k_empty[kHopperStages];
  uint64_t v_full[kHopperStages], v_empty[kHopperStages];
  // There are two items, so that one consumer may begin an item while the other still works on the
  // item before it.
  uint64_t item_full[2], item_empty[2];
  WorkItem items[2];
  int last[kConsumers];  // a word for each consumer, which arrives_last (arrival.cuh) needs
};

// The tiles of keys that a block multiplies are numbered from 0. Tile n uses stage stage_of(n) of
// keys and of values. A consumer waits for the tile at the `full` barrier of this stage, with
// parity parity_of(n) (mbarrier_wait). The same functions serve the work items of a block, which
// are also numbered from 0.
__device__ __forceinline__ int stage_of(int n) { return n % 2; }
__device__ __forceinline__ uint32_t parity_of(int n) { return n / 2 % 2; }
static_assert(kHopperStages == 2);

template <class T, int D>
__device__ __forceinline__ void init_barriers(HopperShared<T, D>& shared) {
  constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
  for (int i = 0; i < kHopperStages; ++i) {
    mbarrier_init(&shared.k_full[i], 1);
    mbarrier_init(&shared.v_full[i], 1);
    mbarrier_init(&shared.k_empty[i], kConsumerWarps);
    mbarrier_init(&shared.v_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(&shared.item_full[i], 1);
    mbarrier_init(&shared.item_empty[i], kConsumers);
  }
  mbarrier_init_fence();
}

// The tensor maps with which the copy engine (TMA) finds keys and values.
struct HopperMaps {
  CUtensorMap k_pool, v_pool;  // [R, D], boxes of 128 rows and 64 columns
  CUtensorMap k, v;            // [T, Hkv, D], boxes of 128 tokens, one head and 64 columns
};

// Claims work for a block, from a counter that all blocks share. The counter is zero before and
// after the launch.
class WorkQueue {
 public:
  __device__ explicit WorkQueue(const AttentionParams& p) : p_(p) {}

  // Sets `item` to the next item, or its key_tiles to 0 if there is no more work.
  __device__ __forceinline__ void next(WorkItem& item) {
    const int tiles = prefill_tiles(p_), group = static_cast<int>(p_.heads / p_.kv_heads);
    const int items = tiles * static_cast<int>(p_.kv_heads) * p_.prefill_splits;
    for (;;) {
      const int claimed = claim();
      if (claimed >= items) {
        // Each block gets here once. The last block zeros the counter for the next launch.
        if (claimed == items + static_cast<int>(gridDim.x) - 1) store_global(counter(), int32_t{0});
        item.key_tiles = 0;
        return;
      }
      // If the keys of all heads fit in the L2 cache, the longest items of all heads come first, so
      // that the blocks end at about the same time. Otherwise one head comes after another, so that
      // the blocks find the keys of their head in the L2 cache.
      const int unit = claimed / p_.prefill_splits, heads = static_cast<int>(p_.kv_heads);
      const bool fits_l2 = p_.tokens <= kTokensInL2;
      const int tile = tiles - 1 - (fits_l2 ? unit / heads : unit % tiles);
      const int kv_head = fits_l2 ? unit % heads : unit / tiles;
      const auto index = static_cast<int>(sequence_of_tile(p_, group, tile));
      const Sequence& s = p_.sequences[index];
      const QueryRows rows(p_, s, kv_head);
      const int row =
          (tile - static_cast<int>(first_tile(s.first_token, group, index))) * kPrefillRows;
      if (row >= rows.count || is_decode(s.count, group)) continue;
      const int end_row = static_cast<int>(min(row + kPrefillRows, rows.count));
      item.keys = VisibleKeys(s, kv_head, window_begin(s.position + rows.token(row), p_.window),
                              s.position + rows.token(end_row - 1) + 1);
      const auto key_tiles = static_cast<int>(ceil_div(item.keys.count, kHopperKeys));
      item.part = claimed % p_.prefill_splits;
      item.parts = static_cast<int>(max(min(p_.prefill_splits, key_tiles / kPartTiles), 1));
      if (item.part >= item.parts) continue;
      item.first_key_tile = key_tiles * item.part / item.parts;
      item.key_tiles = key_tiles * (item.part + 1) / item.parts - item.first_key_tile;
      item.sequence = s;
      item.index = index;
      item.kv_head = kv_head;
      item.number = kv_head * tiles + tile;
      item.row = row;
      item.end_row = end_row;
      return;
    }
  }

 private:
  __device__ __forceinline__ int32_t* counter() const {
    return p_.counters + p_.num_sequences * p_.kv_heads;
  }
  // A block claims its first item by its block index, and all later items from the counter.
  __device__ __forceinline__ int claim() {
    if (begun_) return static_cast<int>(gridDim.x) + atomicAdd(counter(), 1);
    begun_ = true;
    return blockIdx.x;
  }

  const AttentionParams& p_;
  bool begun_ = false;
};

// Where the rows of a tile of keys (or values) lie: contiguous in the pool, contiguous in p.k (or
// p.v) among the sequence's new tokens (its chunk), or not contiguous (apart).
struct TilePlace {
  enum { apart, pool, chunk } kind;
  int row;  // the first row of the pool, or the first packed token; not used if apart
};

// `first` is the offset of the first key of the tile (VisibleKeys).
__device__ __forceinline__ TilePlace place_of_tile(const AttentionParams& p, const Sequence& s,
                                                   const VisibleKeys& keys, int first) {
  const int slot = wrapped_slot(keys.first_slot + first, keys.capacity);
  if (first + kHopperKeys <= keys.history && slot + kHopperKeys <= keys.capacity) {
    return {TilePlace::pool, static_cast<int>(keys.ring) + slot};
  }
  // The tile must not include tokens of another sequence, although they would be masked: infinite
  // values times a probability of 0 would be NaN, so one sequence would spoil another. Later tokens
  // of the same sequence are masked and may be included. Past the last token of the batch the copy
  // engine gives zeros.
  const int64_t token = keys.token + first, end = s.first_token + s.count;
  if (first >= keys.history && (token + kHopperKeys <= end || end == p.tokens)) {
    return {TilePlace::chunk, static_cast<int>(token)};
  }
  return {TilePlace::apart, 0};
}

// Waits until a stage of keys or values is empty, then fills it with the tile at `place`. All
// threads of the producer call this. `parity` is that of the `full` barrier. row_at(row) is the
// address of a row, which is used if the rows are not contiguous.
template <class T, int D, class RowAt>
__device__ __forceinline__ void fill_stage(T* stage, uint64_t* full, uint64_t* empty,
                                           uint32_t parity, TilePlace place,
                                           const CUtensorMap* pool, const CUtensorMap* chunk,
                                           int kv_head, const RowAt& row_at) {
  const SwizzledTile<T, D, kHopperKeys> tile = {stage};
  const int thread = threadIdx.x;
  if (thread == 0) mbarrier_wait(empty, parity ^ 1);
  if (place.kind == TilePlace::apart) {
    __syncwarp();
    named_barrier_sync(kProducerBarrier, kWarpgroup);
    copy_rows<kHopperKeys, kWarpgroup>(tile, thread, row_at);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();  // makes the copies visible to wgmma
    named_barrier_sync(kProducerBarrier, kWarpgroup);
    if (thread == 0) mbarrier_arrive(full);
  } else if (thread == 0) {
    mbarrier_arrive_expect(full, tile.kBytes);
    for (int column = 0; column < tile.kColumns; ++column) {
      T* const shared = tile.elements + column * tile.kColumn;
      if (place.kind == TilePlace::pool) {
        tma_load_2d(shared, pool, full, 64 * column, place.row);
      } else {
        tma_load_3d(shared, chunk, full, 64 * column, kv_head, place.row);
      }
    }
  }
}

// Runs the producer: claims items, and loads keys and values in the order in which the consumers
// need them.
template <class T, int D>
__device__ __forceinline__ void produce(const AttentionParams& p, const HopperMaps& maps,
                                        HopperShared<T, D>& shared) {
  const int thread = threadIdx.x;
  WorkQueue queue(p);
  int before = 0;  // the number of key tiles of the earlier items
  for (int i = 0;; ++i) {
    WorkItem& item = shared.items[stage_of(i)];
    if (thread == 0) {
      mbarrier_wait(&shared.item_empty[stage_of(i)], parity_of(i) ^ 1);
      queue.next(item);
      mbarrier_arrive(&shared.item_full[stage_of(i)]);
    }
    __syncwarp();
    // After this barrier all threads see the item, and no thread uses the item before it any more.
    named_barrier_sync(kProducerBarrier, kWarpgroup);
    const int tiles = item.key_tiles;
    if (tiles == 0) return;
    for (int tile = 0; tile <= tiles; ++tile) {  // keys are loaded one tile ahead of values
      if (tile < tiles) {
        const int first = (item.first_key_tile + tile) * kHopperKeys;
        const int use = before + tile, stage = stage_of(use);
        fill_stage<T, D>(shared.k[stage], &shared.k_full[stage], &shared.k_empty[stage],
                         parity_of(use), place_of_tile(p, item.sequence, item.keys, first),
                         &maps.k_pool, &maps.k, item.kv_head,
                         [&](int row) { return item.keys.template k<T, D>(p, first + row); });
      }
      if (tile > 0) {
        const int first = (item.first_key_tile + tile - 1) * kHopperKeys;
        const int use = before + tile - 1, stage = stage_of(use);
        fill_stage<T, D>(shared.v[stage], &shared.v_full[stage], &shared.v_empty[stage],
                         parity_of(use), place_of_tile(p, item.sequence, item.keys, first),
                         &maps.v_pool, &maps.v, item.kv_head,
                         [&](int row) { return item.keys.template v<T, D>(p, first + row); });
      }
    }
    before += tiles;
  }
}

}  // namespace mistral::cuda

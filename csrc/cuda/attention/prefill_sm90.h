// The interface of the prefill kernel for sm_90a. A build has the kernel if it is compiled for
// sm_90a.
#pragma once

#include <launch.cuh>

#include "merge.cuh"

namespace mistral::cuda {

constexpr int kHopperKeys = 128;  // keys in a tile of keys
constexpr int kConsumers = 2;     // warpgroups that share a tile of query rows
constexpr int kConsumerRows = kPrefillRows / kConsumers;
constexpr int kPartTiles = 4;  // if keys are divided into parts, a part has at least so many tiles

// Prefills the sequences that attention_decode does not handle. p must meet the conditions of
// `attention` (attention.h).
cudaError_t attention_hopper(const AttentionParams& p, cudaStream_t stream);

// Adds the scratch that attention_hopper needs if no sequence sees more than `longest` keys. Its
// counters lie behind the S * Hkv counters of AttentionParams::counters. The first belongs to the
// queue of work (WorkQueue). If keys are divided into parts, there is also a counter for each tile
// of query rows, key/value head and consumer. It counts the parts that are done.
inline void add_hopper_scratch(AttentionScratch& scratch, const AttentionParams& p,
                               int64_t longest) {
  // There should be about as many parts as multiprocessors. But each part has at least
  // kPartTiles tiles, because a smaller part is not worth its merge.
  const int64_t group = p.heads / p.kv_heads;
  const int64_t tiles = ceil_div(p.tokens * group, kPrefillRows) * p.kv_heads;
  const int64_t wanted = multiprocessors() / max(tiles, 1);
  const int64_t sensible = longest / (kPartTiles * kHopperKeys);
  scratch.prefill_splits = static_cast<int32_t>(max(min(wanted, sensible), 1));
  scratch.counters += 1;
  if (scratch.prefill_splits == 1) return;
  const int64_t parties = int64_t{prefill_tiles(p)} * p.kv_heads * kConsumers;
  scratch.counters += parties;
  // The decode kernel is done when prefill begins, so both may use the same memory.
  const int64_t partials = parties * scratch.prefill_splits * kConsumerRows * (p.head_dim + 4);
  scratch.partials = max(scratch.partials, partials);
}

}  // namespace mistral::cuda

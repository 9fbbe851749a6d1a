// The prefill kernel of sm_90a, for those who launch it. A build has it if it is for that
// architecture too.
#pragma once

#include <launch.cuh>

#include "merge.cuh"

namespace mistral::cuda {

constexpr int kHopperKeys = 128;  // of a tile
constexpr int kConsumers = 2;     // warpgroups, each with its share of a tile's query rows
constexpr int kConsumerRows = kPrefillRows / kConsumers;
constexpr int kPartTiles = 4;  // of keys, the least that a part of them is worth its merging

// Prefills the sequences that attention_decode leaves. What it wants of p is what `attention` does.
cudaError_t attention_hopper(const AttentionParams& p, cudaStream_t stream);

// Adds what it needs, for sequences that see at most `longest` keys. Its counters follow those of
// the late tokens: the work queue's, then one for each consumer's rows if keys are divided.
inline void add_hopper_scratch(AttentionScratch& scratch, const AttentionParams& p,
                               int64_t longest) {
  // As many parts as blocks fit the machine at once, as long as they are worth it.
  const int64_t group = p.heads / p.kv_heads;
  const int64_t tiles = ceil_div(p.tokens * group, kPrefillRows) * p.kv_heads;
  const int64_t wanted = multiprocessors() / max(tiles, 1);
  const int64_t sensible = longest / (kPartTiles * kHopperKeys);
  scratch.prefill_splits = static_cast<int32_t>(max(min(wanted, sensible), 1));
  scratch.counters += 1;
  if (scratch.prefill_splits == 1) return;
  const int64_t parties = int64_t{prefill_tiles(p)} * p.kv_heads * kConsumers;
  scratch.counters += parties;
  // Decodes are done when prefill begins: both may use the same memory.
  const int64_t partials = parties * scratch.prefill_splits * kConsumerRows * (p.head_dim + 4);
  scratch.partials = max(scratch.partials, partials);
}

}  // namespace mistral::cuda

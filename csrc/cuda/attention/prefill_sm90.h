// The interface of the prefill kernel of sm_90a. A build has the kernel if sm_90a is among its
// architectures.
#pragma once

#include <launch.cuh>

#include "merge.cuh"

namespace mistral::cuda {

constexpr int kHopperKeys = 128;  // keys of a tile
constexpr int kConsumers = 2;     // warpgroups, each with its share of a tile's query rows
constexpr int kConsumerRows = kPrefillRows / kConsumers;
constexpr int kPartTiles = 4;  // the fewest tiles of keys for which a part is worth its merge

// Prefills the sequences that attention_decode leaves out. p must meet the conditions of
// `attention` (attention.h).
cudaError_t attention_hopper(const AttentionParams& p, cudaStream_t stream);

// Adds the scratch that attention_hopper needs if no sequence sees more than `longest` keys. Its
// counters lie after the counters of the late tokens: a counter for the work queue and, if keys are
// divided, a counter for the rows of each consumer.
inline void add_hopper_scratch(AttentionScratch& scratch, const AttentionParams& p,
                               int64_t longest) {
  // There are enough parts to give every multiprocessor a block, but no part so short that it is
  // not worth its merge.
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

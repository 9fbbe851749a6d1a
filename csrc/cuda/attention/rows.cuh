// The query rows of a sequence and key/value head, the choice between decode and prefill for each
// sequence, and the numbering of tiles of query rows.
#pragma once

#include <launch.cuh>

#include "../../attention.h"

namespace mistral::cuda {

// The query rows of a sequence and key/value head. The head has a group of G query heads. Row r is
// head r mod G of this group, for token r / G of the sequence's new tokens.
struct QueryRows {
  int64_t first_token;
  int first_head;  // first query head of the group
  int group;
  int count;  // the number of rows: G for each new token

  template <class Params>
  __device__ QueryRows(const Params& p, const Sequence& s, int kv_head)
      : first_token(s.first_token),
        first_head(kv_head * static_cast<int>(p.heads / p.kv_heads)),
        group(static_cast<int>(p.heads / p.kv_heads)),
        count(static_cast<int>(s.count) * group) {}

  __device__ __forceinline__ int token(int row) const { return row / group; }
  // The offset of a row, in elements, in a tensor with these strides, such as q or out.
  __device__ __forceinline__ int64_t offset(int row, int64_t stride_token,
                                            int64_t stride_head) const {
    return (first_token + row / group) * stride_token + (first_head + row % group) * stride_head;
  }
};

// Sequences with up to 16 query rows for each key/value head are decoded. All others are prefilled.
// 16 is the number of rows of a product of the tensor cores (mma_m16n8k16 in ptx.cuh).
constexpr int kDecodeRows = 16;

MISTRAL_HOST_DEVICE bool is_decode(int64_t tokens, int64_t group) {
  return tokens * group <= kDecodeRows;
}

constexpr int kPrefillRows = 128;  // query rows of a tile

// The index of the first tile of a sequence, among the tiles of all sequences for one key/value
// head. The host sizes the grid, but the table with the sequences' lengths is on the device. So
// tiles are numbered by a formula whose largest value the host knows. It gives every sequence as
// many indices as it has tiles, or one more: c rows from row f on need ceil(c / kRows) indices, and
// get floor((f + c) / kRows) - floor(f / kRows) + 1. A block whose tile has no row does nothing.
template <int kRows = kPrefillRows>
MISTRAL_HOST_DEVICE int64_t first_tile(int64_t first_token, int64_t group, int64_t sequence) {
  return first_token * group / kRows + sequence;
}

// The number of indices that first_tile gives to all sequences together.
template <int kRows = kPrefillRows, class Params>
MISTRAL_HOST_DEVICE int tiles_of_all(const Params& p, int64_t group) {
  return static_cast<int>(first_tile<kRows>(p.tokens, group, p.num_sequences));
}
MISTRAL_HOST_DEVICE int prefill_tiles(const AttentionParams& p) {
  return tiles_of_all(p, p.heads / p.kv_heads);
}

template <int kRows = kPrefillRows, class Params>
__device__ __forceinline__ int64_t sequence_of_tile(const Params& p, int64_t group, int64_t tile) {
  int64_t low = 0, high = p.num_sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_tile<kRows>(p.sequences[middle].first_token, group, middle) <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace mistral::cuda

// Ring arithmetic. This file alone decides where in the pools the key and value of a token are
// stored.
//
// A layer has a key pool and a value pool, both [R, D]. In each, a sequence owns a ring of C slots,
// at the same rows of both pools. The ring is head-major, [Hkv, C, D], so that the keys of one head
// are contiguous. It starts at row `ring_row`:
//
//     row(head, position) = ring_row + head * C + position mod C
//
// The new tokens of a sequence in one call are its chunk. The sequence's earlier tokens are its
// history. A query at position p sees the positions (p - W, p]: itself and the W - 1 before it. So
// the queries of a chunk read at most W - 1 tokens of history, and a ring of C = W slots is enough.
// A sequence that never grows past C tokens needs no more than C slots, whatever the window.
//
// A chunk must not overwrite tokens that its queries still need. Token p replaces token p - C in
// its slot. If the first query of the chunk sees p - C, then p must wait until attention is done.
// So a new token is
//   - never stored, if a later token of its own chunk takes the same slot;
//   - stored before attention (by rope), if no query of the chunk sees the token that it replaces;
//     this is so in every chunk of one token, and in every chunk that replaces nothing;
//   - stored after attention (by attention itself), otherwise.
// Each slot is written at most once per call, so the order within a call does not matter.
#pragma once

#include "common.h"

namespace mistral {

// One row of the sequence table. The table is an int64 tensor [S, 5] in the memory of the device,
// so that a captured CUDA graph can be replayed in every step.
struct Sequence {
  int64_t first_token;  // index of the sequence's first new token in the packed tensors [T, ...]
  int64_t count;        // number of new tokens: 0 if idle, 1 in a usual decode step
  int64_t position;     // position of the first new token = number of tokens of history
  int64_t ring_row;     // first row of the ring in the pools
  int64_t capacity;     // C
};
constexpr int64_t kSequenceFields = 5;
static_assert(sizeof(Sequence) == kSequenceFields * sizeof(int64_t), "read as rows of int64");

// The index of the sequence that owns a packed token. Tokens are packed in the order of the table,
// so the owner is the last sequence that begins at or before the token.
MISTRAL_HOST_DEVICE int64_t find_sequence(const Sequence* sequences, int64_t num_sequences,
                                          int64_t token) {
  int64_t low = 0, high = num_sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (sequences[middle].first_token <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Stands for the window in models without one. It is larger than any position.
constexpr int64_t kNoWindow = int64_t{1} << 62;

MISTRAL_HOST_DEVICE int64_t ring_slot(const Sequence& s, int64_t position) {
  return position % s.capacity;
}

// slot mod C for a slot below 2 C, without a division.
MISTRAL_HOST_DEVICE int wrapped_slot(int slot, int capacity) {
  return slot < capacity ? slot : slot - capacity;
}

// The pool row of slot 0 of a head.
MISTRAL_HOST_DEVICE int64_t head_row(const Sequence& s, int64_t head) {
  return s.ring_row + head * s.capacity;
}

// The pool rows of a token: one row for each head.
struct TokenRows {
  int64_t first;  // the row of head 0
  int64_t apart;  // the distance from the row of a head to that of the next head

  MISTRAL_HOST_DEVICE int64_t row(int64_t head) const { return first + head * apart; }
};

MISTRAL_HOST_DEVICE TokenRows token_rows(const Sequence& s, int64_t position) {
  return {s.ring_row + ring_slot(s, position), s.capacity};
}

MISTRAL_HOST_DEVICE int64_t ring_row(const Sequence& s, int64_t head, int64_t position) {
  return token_rows(s, position).row(head);
}

// The first position that a query at `position` sees.
MISTRAL_HOST_DEVICE int64_t window_begin(int64_t position, int64_t window) {
  return max(0, position - window + 1);
}

// The first position whose query no longer sees the key at `position`.
template <class Int>
MISTRAL_HOST_DEVICE Int window_end(Int position, Int window) {
  return position + window;
}

// Whether the key at position `key` is hidden from the query at position `query`. Only their
// distance matters, so kernels may count both from the same origin, in 32 bits.
template <class Int>
MISTRAL_HOST_DEVICE bool is_hidden(Int query, Int key, Int window) {
  return key > query || key <= query - window;
}

// Whether any of the keys [first_key, last_key] is hidden from any of the queries [first_query,
// last_query].
template <class Int>
MISTRAL_HOST_DEVICE bool any_hidden(Int first_query, Int last_query, Int first_key, Int last_key,
                                    Int window) {
  return last_key > first_query || first_key <= last_query - window;
}

// The window for positions in 32 bits. kNoWindow becomes 2^30, more positions than memory holds.
MISTRAL_HOST_DEVICE int short_window(int64_t window) {
  return static_cast<int>(min(window, int64_t{1} << 30));
}

// The first position of a chunk that is stored. Earlier positions of the chunk are not, because
// later tokens of the chunk take their slots.
MISTRAL_HOST_DEVICE int64_t first_stored(const Sequence& s) {
  return max(s.position, s.position + s.count - s.capacity);
}

MISTRAL_HOST_DEVICE bool stored(const Sequence& s, int64_t position) {
  return position >= s.position + s.count - s.capacity;
}

MISTRAL_HOST_DEVICE bool stored_before_attention(const Sequence& s, int64_t position,
                                                 int64_t window) {
  return stored(s, position) && position - s.capacity < window_begin(s.position, window);
}

MISTRAL_HOST_DEVICE bool stored_after_attention(const Sequence& s, int64_t position,
                                                int64_t window) {
  return stored(s, position) && !stored_before_attention(s, position, window);
}

// Consecutive positions that lie in consecutive slots.
struct Run {
  int64_t slot;      // the slot of the first position
  int64_t position;  // the first position
  int64_t count;     // the number of positions
};

// Splits the positions [begin, end), at most s.capacity of them, into two runs and returns run
// `index`, 0 or 1. Run 0 goes from `begin` to the last slot of the ring, or to `end` if that comes
// first. Run 1 has the other positions, from slot 0 on, and is often empty.
MISTRAL_HOST_DEVICE Run ring_run(const Sequence& s, int64_t begin, int64_t end, int index) {
  const int64_t slot = ring_slot(s, begin);
  const int64_t count = min(end - begin, s.capacity - slot);
  return index == 0 ? Run{slot, begin, count} : Run{0, begin + count, end - begin - count};
}

}  // namespace mistral

// A task computes query rows of one key/value head of one sequence. A query row is one query head
// of one token: row r belongs to token r / G, and is number r mod G of the G heads that share the
// key/value head. So neighbouring rows share every key and value that is loaded. The task goes
// through all keys that any of its rows sees: first the history in the ring, then the chunk.
//
// In prefill each task takes some of the rows, and all of their keys. In decode there are too few
// rows to divide. So each task takes all rows and a segment of the keys, and the results of the
// segments are merged at the end. Where a segment begins depends on its sequence alone, so neither
// the number of threads nor the rest of the batch changes a bit of the results.
#include "../../attention.h"

#include "../append.h"
#include "../kernels.h"
#include "../parallel.h"
#include "decode.h"
#include "prefill.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kFewRows = DecodeRows<float>::kRows;
// The number of keys in a segment. It is small enough that a long sequence has work for many
// threads.
constexpr int64_t kSegment = 1024;

// How the work for one key/value head of a sequence is divided into tasks.
struct Division {
  int64_t rows;      // the number of query rows
  int64_t blocks;    // the number of blocks of rows; 1 for up to kFewRows rows, 0 for none
  int64_t segments;  // the number of segments of keys
  int64_t partials;  // the number of floats for partial results of all heads; 0 with one segment

  Division(const AttentionParams& p, const Sequence& s) {
    rows = s.count * (p.heads / p.kv_heads);
    const int64_t keys = s.position + s.count - window_begin(s.position, p.window);
    const bool few = rows <= kFewRows;
    blocks = few ? mistral::min(rows, 1) : ceil_div(rows, PrefillRows<float>::kRows);
    segments = few ? ceil_div(keys, kSegment) : 1;
    partials = segments > 1 ? p.kv_heads * segments * blocks * rows * (p.head_dim + 2) : 0;
  }
};

// The address of the result of a row over a segment, in `partials` [Hkv, segments, rows, D + 2]. A
// result is the weighted sum of values [D], the sum of the weights, and the maximum of the scores.
// Both sums are relative to this maximum.
float* partial_row(const AttentionParams& p, const Division& division, float* partials,
                   int64_t kv_head, int64_t segment, int64_t row) {
  const int64_t index = (kv_head * division.segments + segment) * division.rows + row;
  return partials + index * (p.head_dim + 2);
}

template <class T>
T* out_row(const AttentionParams& p, const Sequence& s, int64_t kv_head, int64_t row) {
  const int64_t group = p.heads / p.kv_heads;
  return static_cast<T*>(p.out) + (s.first_token + row / group) * p.stride_out_token +
         (kv_head * group + row % group) * p.stride_out_head;
}

// Finds the keys and values of one key/value head of a sequence. Tokens before the chunk are in the
// ring. Tokens of the chunk are in the packed tensors of the call.
template <class T>
class Source {
 public:
  Source(const AttentionParams& p, const Sequence& s, int64_t kv_head)
      : s_(s), dim_(p.head_dim), stride_k_(p.stride_k_token), stride_v_(p.stride_v_token) {
    const int64_t ring = head_row(s, kv_head) * dim_;
    ring_ = {static_cast<const T*>(p.k_pool) + ring, static_cast<const T*>(p.v_pool) + ring};
    chunk_ = {static_cast<const T*>(p.k) + s.first_token * stride_k_ + kv_head * p.stride_k_head,
              static_cast<const T*>(p.v) + s.first_token * stride_v_ + kv_head * p.stride_v_head};
  }

  KeyValue<T> at(int64_t position) const {
    const int64_t token = position - s_.position;
    return token < 0 ? of_slot(ring_slot(s_, position)) : of_token(token);
  }

  // Calls f with the keys at positions [begin, end), in up to three runs: two of the ring and one
  // of the chunk. Within a run the keys are equally far apart. The run of the chunk comes even if
  // it has no keys. Then its count is 0 or negative.
  template <class F>
  void for_each_run(int64_t begin, int64_t end, const F& f) const {
    const int64_t history_end = mistral::min(end, s_.position);
    for (int index = 0; index < 2 && begin < history_end; ++index) {
      const Run run = ring_run(s_, begin, history_end, index);
      const KeyValue<T> first = of_slot(run.slot);
      f(Keys<T>{first.k, first.v, dim_, dim_, run.position, run.count});
    }
    const int64_t own = mistral::max(begin, s_.position);
    const KeyValue<T> first = of_token(own - s_.position);
    f(Keys<T>{first.k, first.v, stride_k_, stride_v_, own, end - own});
  }

 private:
  KeyValue<T> of_slot(int64_t slot) const { return {ring_.k + slot * dim_, ring_.v + slot * dim_}; }
  KeyValue<T> of_token(int64_t token) const {
    return {chunk_.k + token * stride_k_, chunk_.v + token * stride_v_};
  }

  const Sequence& s_;
  int64_t dim_, stride_k_, stride_v_;
  KeyValue<T> ring_;   // of slot 0
  KeyValue<T> chunk_;  // of the first token of the chunk
};

// Writes the log-sum-exp of a row, if p.lse is not null. `total` is the sum of the probabilities,
// which are relative to `maximum`.
void write_lse(const AttentionParams& p, const Sequence& s, int64_t kv_head, int64_t row,
               float maximum, float total) {
  if (!p.lse) return;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t token = s.first_token + row / group;
  p.lse[token * p.heads + kv_head * group + row % group] = maximum + logf(total);
}

// Computes a block of rows over a segment of their keys. Rows is DecodeRows<T> or PrefillRows<T>.
// Writes the outputs or, if there are several segments, the partial results.
template <class T, class Rows>
void attend(const AttentionParams& p, const Sequence& s, const Division& division, float* partials,
            int64_t kv_head, int64_t block, int64_t segment) {
  const int64_t group = p.heads / p.kv_heads, dim = p.head_dim;
  const int64_t first_row = block * Rows::kRows;
  const int64_t count = mistral::min(Rows::kRows, division.rows - first_row);
  // The last row of an incomplete block is repeated, to fill up to a multiple of kRowStep rows.
  const auto token_of = [&](int64_t row) {
    return (first_row + mistral::min(row, count - 1)) / group;
  };
  const auto position_of = [&](int64_t row) { return s.position + token_of(row); };

  Rows rows;
  rows.rows = ceil_div(count, Rows::kRowStep) * Rows::kRowStep;
  rows.clear(dim);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t head = kv_head * group + (first_row + mistral::min(row, count - 1)) % group;
    const T* q = static_cast<const T*>(p.q) + (s.first_token + token_of(row)) * p.stride_q_token +
                 head * p.stride_q_head;
    using A = typename Rows::Arithmetic;
    for (int64_t d = 0; d < dim; d += kStep<A>)
      A::store(rows.q + row * dim + d, A::load_row(q + d));
  }

  // Together the rows see positions [begin, end). Positions before s.position are in the ring.
  int64_t begin = window_begin(position_of(0), p.window);
  int64_t end = position_of(count - 1) + 1;
  if (division.segments > 1) {
    begin += segment * kSegment;
    end = mistral::min(end, begin + kSegment);
  }
  const Source<T> source(p, s, kv_head);
  if constexpr (std::is_same_v<Rows, PrefillRows<T>>) {
    const auto key_at = [&](int64_t position) { return source.at(position); };
    rows.attend(begin, end, key_at, dim, p.window, p.scale, position_of);
  } else {
    source.for_each_run(begin, end, [&](const Keys<T>& keys) {
      rows.attend(keys, dim, p.window, p.scale, position_of);
    });
  }

  for (int64_t row = 0; row < count; ++row) {
    const float* sums = rows.out + row * dim;
    if (division.segments > 1) {
      float* partial = partial_row(p, division, partials, kv_head, segment, row);
      for (int64_t d = 0; d < dim; d += Vec::width) store(partial + d, load(sums + d));
      partial[dim] = rows.total(row);
      partial[dim + 1] = rows.maximum(row);
    } else {
      T* out = out_row<T>(p, s, kv_head, first_row + row);
      const Vec inverse = broadcast(1.0f / rows.total(row));
      for (int64_t d = 0; d < dim; d += Vec::width) store(out + d, load(sums + d) * inverse);
      write_lse(p, s, kv_head, first_row + row, rows.maximum(row), rows.total(row));
    }
  }
}

template <class T>
void merge_segments(const AttentionParams& p, const Sequence& s, const Division& division,
                    float* partials, int64_t kv_head, int64_t row) {
  const int64_t dim = p.head_dim;
  const auto partial = [&](int64_t segment) {
    return partial_row(p, division, partials, kv_head, segment, row);
  };
  float maximum = -INFINITY;
  for (int64_t i = 0; i < division.segments; ++i) maximum = fmaxf(maximum, partial(i)[dim + 1]);
  float sums[kMaxHeadDim] = {};
  float total = 0.0f;
  for (int64_t i = 0; i < division.segments; ++i) {
    const float factor = expf(partial(i)[dim + 1] - maximum);
    total += factor * partial(i)[dim];
    for (int64_t d = 0; d < dim; d += Vec::width) {
      store(sums + d, fma(broadcast(factor), load(partial(i) + d), load(sums + d)));
    }
  }
  T* out = out_row<T>(p, s, kv_head, row);
  const Vec inverse = broadcast(1.0f / total);
  for (int64_t d = 0; d < dim; d += Vec::width) store(out + d, load(sums + d) * inverse);
}

// Merges the segments of all rows of one key/value head of a sequence, if there are several.
template <class T>
void merge_head(const AttentionParams& p, int64_t sequence, int64_t kv_head) {
  float* partials = p.partials;
  for (int64_t i = 0; i < sequence; ++i) partials += Division(p, p.sequences[i]).partials;
  const Sequence& s = p.sequences[sequence];
  const Division division(p, s);
  for (int64_t row = 0; division.partials > 0 && row < division.rows; ++row) {
    merge_segments<T>(p, s, division, partials, kv_head, row);
  }
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionParams& p) {
  int64_t floats = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) floats += Division(p, p.sequences[i]).partials;
  return floats * int64_t{sizeof(float)};
}

void attention(const AttentionParams& p, int threads) {
  const auto tasks_of = [&](const Division& d) { return d.blocks * d.segments * p.kv_heads; };
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) tasks += tasks_of(Division(p, p.sequences[i]));

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, tasks, [&](int64_t task) {
      const Sequence* s = p.sequences;
      Division division(p, *s);
      float* partials = p.partials;
      while (task >= tasks_of(division)) {
        task -= tasks_of(division);
        partials += division.partials;
        division = Division(p, *++s);
      }
      const int64_t kv_head = task % p.kv_heads, part = task / p.kv_heads;
      if (division.rows <= kFewRows) {
        attend<T, DecodeRows<T>>(p, *s, division, partials, kv_head, 0, part);
      } else {
        attend<T, PrefillRows<T>>(p, *s, division, partials, kv_head, part, 0);
      }
    });
    if (attention_scratch_bytes(p) > 0) {
      parallel_for(threads, p.num_sequences * p.kv_heads,
                   [&](int64_t task) { merge_head<T>(p, task / p.kv_heads, task % p.kv_heads); });
    }
    for (int64_t i = 0; i < p.num_sequences; ++i) {
      const Sequence& s = p.sequences[i];
      for (int64_t token = s.first_token; token < s.first_token + s.count; ++token) {
        const int64_t position = s.position + token - s.first_token;
        if (stored_after_attention(s, position, p.window)) append<T>(p, s, token);
      }
    }
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

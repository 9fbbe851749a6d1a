// A task owns up to kRows query rows of one key/value head of one sequence: row r is query head
// r mod G of token r / G, so that the heads of a group share every key and value that is loaded.
// It walks the keys that any of its rows sees, in tiles of kKeys: first the history, which lies
// in the ring as two runs, then the chunk itself. A tile is widened to fp32 once (16 KB each of
// keys and values at D = 128: they stay in the L1 cache), multiplied with all rows, masked at
// the two edges of the window only, and folded into the rows' running softmax.
#include "../attention.h"

#include "append.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kKeys = 32;

struct Tile {
  alignas(64) float q[kRows * kMaxHeadDim];    // [rows, D], scaled
  alignas(64) float k[kKeys * kMaxHeadDim];    // [keys, D]
  alignas(64) float v[kKeys * kMaxHeadDim];    // [keys, D]
  alignas(64) float out[kRows * kMaxHeadDim];  // [rows, D], before division by total
  alignas(64) float scores[kRows * kKeys];     // [rows, keys], then probabilities
  float maximum[kRows];                        // running maximum of each row's scores
  float total[kRows];                          // running sum of exp(score - maximum)
  int64_t rows;                                // those in use
  int64_t keys;
};

// Keys and values of consecutive positions, `stride` elements apart.
template <class T>
struct Keys {
  const T* k;
  const T* v;
  int64_t stride_k;
  int64_t stride_v;
  int64_t position;  // of the first
  int64_t count;
};

// Widens a row of keys or values, and fetches the row that takes its place in the next tile: the
// memory then works while this tile is multiplied.
template <class T>
void widen(const T* x, int64_t stride, float* out, int64_t dim) {
  const T* next = x + kKeys * stride;
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(next + d);
  for (int64_t d = 0; d < dim; d += Vec::width) store(out + d, load(x + d));
}

// scores = q k^T in blocks of N rows x 4 keys, one vector of partial sums for each
template <int N>
void score_rows(Tile& tile, int64_t row, int64_t dim) {
  const float* q = tile.q + row * dim;
  for (int64_t key = 0; key < tile.keys; key += 4) {
    const float* k = tile.k + key * dim;
    Vec partial[N][4];
    for (int r = 0; r < N; ++r) {
      for (int j = 0; j < 4; ++j) partial[r][j] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < dim; d += Vec::width) {
      for (int r = 0; r < N; ++r) {
        const Vec x = load(q + r * dim + d);
        for (int j = 0; j < 4; ++j) partial[r][j] = fma(x, load(k + j * dim + d), partial[r][j]);
      }
    }
    for (int r = 0; r < N; ++r) sum4(partial[r], tile.scores + (row + r) * kKeys + key);
  }
}

// Folds one row's scores into its running softmax: [begin, end) are the keys it sees. Leaves the
// probabilities, relative to the running maximum, in their place and returns the factor that
// brings the row's earlier sums to the new maximum.
float fold_row(Tile& tile, int64_t row, int64_t begin, int64_t end) {
  float* scores = tile.scores + row * kKeys;
  for (int64_t j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int64_t j = end; j < kKeys; ++j) scores[j] = -INFINITY;
  Vec highest = broadcast(tile.maximum[row]);
  for (int64_t j = 0; j < kKeys; j += Vec::width) highest = vmax(highest, load(scores + j));
  const float maximum = largest(highest);
  // A row that has seen no key yet keeps maximum -inf; any finite value then gives exp(-inf) = 0.
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  Vec total = broadcast(0.0f);
  for (int64_t j = 0; j < kKeys; j += Vec::width) {
    const Vec probability = exp(load(scores + j) - broadcast(base));
    store(scores + j, probability);
    total = total + probability;
  }
  const float factor = expf(tile.maximum[row] - base);
  tile.maximum[row] = maximum;
  tile.total[row] = tile.total[row] * factor + sum(total);
  return factor;
}

// out = factor * out + p v for N rows, two vectors of columns at a time
template <int N>
void accumulate_rows(Tile& tile, int64_t row, int64_t dim, const float* factors) {
  const float* p = tile.scores + row * kKeys;
  float* out = tile.out + row * dim;
  for (int64_t d = 0; d < dim; d += 2 * Vec::width) {
    Vec sums[N][2];
    for (int r = 0; r < N; ++r) {
      for (int i = 0; i < 2; ++i) {
        sums[r][i] = load(out + r * dim + d + i * Vec::width) * broadcast(factors[r]);
      }
    }
    for (int64_t j = 0; j < tile.keys; ++j) {
      const Vec v0 = load(tile.v + j * dim + d), v1 = load(tile.v + j * dim + d + Vec::width);
      for (int r = 0; r < N; ++r) {
        const Vec weight = broadcast(p[r * kKeys + j]);
        sums[r][0] = fma(weight, v0, sums[r][0]);
        sums[r][1] = fma(weight, v1, sums[r][1]);
      }
    }
    for (int r = 0; r < N; ++r) {
      for (int i = 0; i < 2; ++i) store(out + r * dim + d + i * Vec::width, sums[r][i]);
    }
  }
}

// Calls f(row, integral constant N) over all rows, four at a time and the last ones singly.
struct Four {
  static constexpr int value = 4;
};
struct One {
  static constexpr int value = 1;
};
template <class F>
MISTRAL_SIMD void for_row_blocks(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) f(row, Four{});
  for (; row < rows; ++row) f(row, One{});
}

// Attends the tile's rows, whose positions are position_of(row), to all of `keys`.
template <class T, class PositionOf>
void attend(Tile& tile, const Keys<T>& keys, int64_t dim, int64_t window,
            const PositionOf& position_of) {
  for (int64_t first = 0; first < keys.count; first += kKeys) {
    tile.keys = mistral::min(kKeys, keys.count - first);
    for (int64_t j = 0; j < tile.keys; ++j) {
      widen(keys.k + (first + j) * keys.stride_k, keys.stride_k, tile.k + j * dim, dim);
      widen(keys.v + (first + j) * keys.stride_v, keys.stride_v, tile.v + j * dim, dim);
    }
    for_row_blocks(tile.rows, [&](int64_t row, auto n) { score_rows<n.value>(tile, row, dim); });
    float factors[kRows];
    const int64_t position = keys.position + first;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t own = position_of(row);
      const int64_t begin = window_begin(own, window) - position;
      const int64_t end = own + 1 - position;
      factors[row] = fold_row(tile, row, mistral::min(mistral::max(begin, 0), tile.keys),
                              mistral::max(mistral::min(end, tile.keys), 0));
    }
    for_row_blocks(tile.rows, [&](int64_t row, auto n) {
      accumulate_rows<n.value>(tile, row, dim, factors + row);
    });
  }
}

template <class T>
void attend_block(const AttentionParams& p, const Sequence& s, int64_t kv_head, int64_t block) {
  const int64_t group = p.heads / p.kv_heads, dim = p.head_dim;
  const int64_t first_row = block * kRows;
  Tile tile;
  tile.rows = mistral::min(kRows, s.count * group - first_row);

  const auto token_of = [&](int64_t row) { return (first_row + row) / group; };
  const auto head_of = [&](int64_t row) { return kv_head * group + (first_row + row) % group; };
  const auto position_of = [&](int64_t row) { return s.position + token_of(row); };

  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* q = static_cast<const T*>(p.q) + (s.first_token + token_of(row)) * p.stride_q_token +
                 head_of(row) * p.stride_q_head;
    for (int64_t d = 0; d < dim; d += Vec::width) {
      store(tile.q + row * dim + d, load(q + d) * broadcast(p.scale));
      store(tile.out + row * dim + d, broadcast(0.0f));
    }
    tile.maximum[row] = -INFINITY;
    tile.total[row] = 0.0f;
  }

  // What any row sees: [begin, end), the part before s.position in the ring.
  const int64_t begin = window_begin(position_of(0), p.window);
  const int64_t end = position_of(tile.rows - 1) + 1;
  for (int index = 0; index < 2 && begin < s.position; ++index) {
    const Run run = ring_run(s, begin, s.position, index);
    const int64_t offset = (s.ring_row + kv_head * s.capacity + run.slot) * dim;
    const Keys<T> history = {static_cast<const T*>(p.k_pool) + offset,
                             static_cast<const T*>(p.v_pool) + offset,
                             dim,
                             dim,
                             run.position,
                             run.count};
    attend(tile, history, dim, p.window, position_of);
  }
  const int64_t own_begin = mistral::max(begin, s.position);
  const int64_t token = s.first_token + own_begin - s.position;
  const Keys<T> chunk = {
      static_cast<const T*>(p.k) + token * p.stride_k_token + kv_head * p.stride_k_head,
      static_cast<const T*>(p.v) + token * p.stride_v_token + kv_head * p.stride_v_head,
      p.stride_k_token,
      p.stride_v_token,
      own_begin,
      end - own_begin};
  attend(tile, chunk, dim, p.window, position_of);

  for (int64_t row = 0; row < tile.rows; ++row) {
    T* out = static_cast<T*>(p.out) + (s.first_token + token_of(row)) * p.stride_out_token +
             head_of(row) * p.stride_out_head;
    const Vec inverse = broadcast(1.0f / tile.total[row]);
    for (int64_t d = 0; d < dim; d += Vec::width) {
      store(out + d, load(tile.out + row * dim + d) * inverse);
    }
  }
}

}  // namespace

void attention(const AttentionParams& p, int threads) {
  const int64_t group = p.heads / p.kv_heads;
  const auto blocks_of = [&](const Sequence& s) { return ceil_div(s.count * group, kRows); };
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) tasks += blocks_of(p.sequences[i]) * p.kv_heads;

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, tasks, [&](int64_t task) {
      const Sequence* s = p.sequences;
      while (task >= blocks_of(*s) * p.kv_heads) {
        task -= blocks_of(*s) * p.kv_heads;
        ++s;
      }
      attend_block<T>(p, *s, task % p.kv_heads, task / p.kv_heads);
    });
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

// A task computes d_k and d_v of a block of keys of one key/value head, or d_q of a block of query
// rows. Row r of a sequence is query head r mod G of token r / G, as in attention.cpp. Both kinds
// of tasks compute the scores, so that no two tasks add to the same sum: results do not depend on
// the number of threads. All products are computed in fp32.
#include "../../attention_backward.h"

#include "../kernels.h"
#include "../parallel.h"
#include "rows.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kTile = 64;   // query rows, and keys, that are multiplied at a time
constexpr int64_t kDepth = 32;  // products that are summed before the sum joins the result

// out [rows, columns] += a b, with a(row, k) the address of an element of a, and b [depth,
// columns]. `rows` is a multiple of kRowBlock, `columns` of 32.
template <class At>
void add_product(int64_t rows, int64_t depth, int64_t columns, const At& a, const float* b,
                 float* out) {
  for (int64_t row = 0; row < rows; row += kRowBlock) {
    for (int64_t first = 0; first < depth; first += kDepth) {
      add_weighted<Fp32>(
          mistral::min(kDepth, depth - first), columns,
          [&](int64_t k, int64_t column, auto& values) {
            const float* from = b + (first + k) * columns + column;
            for (Vec& value : values) {
              value = load(from);
              from += Vec::width;
            }
          },
          [&](int64_t r, int64_t k) { return a(row + r, first + k); }, [](int64_t) { return 1.0f; },
          out + row * columns);
    }
  }
}

// Neighbouring rows of one head [kTile, D] in fp32. Rows past the last are zeros.
struct Rows {
  alignas(64) float at[kTile * kMaxHeadDim];

  // address(row): where a row begins.
  template <class Address>
  void take(int64_t count, int64_t dim, const Address& address) {
    for (int64_t row = 0; row < count; ++row) {
      const auto* from = address(row);
      for (int64_t d = 0; d < dim; d += Vec::width) store(at + row * dim + d, load(from + d));
    }
    memset(at + count * dim, 0, static_cast<size_t>((kTile - count) * dim) * sizeof(float));
  }
  void clear(int64_t dim) { memset(at, 0, static_cast<size_t>(kTile * dim) * sizeof(float)); }
};

// The same rows as columns, [D, kTile].
struct Columns {
  alignas(64) float at[kMaxHeadDim * kTile];

  void take(const Rows& rows, int64_t dim) {
    for (int64_t row = 0; row < kTile; row += Vec::width) {
      for (int64_t d = 0; d < dim; d += Vec::width) {
        Vec square[Vec::width];
        for (int64_t i = 0; i < Vec::width; ++i) square[i] = load(rows.at + (row + i) * dim + d);
        transpose(square);
        for (int64_t i = 0; i < Vec::width; ++i) store(at + (d + i) * kTile + row, square[i]);
      }
    }
  }
};

// One key/value head of one sequence.
template <class T>
class Head {
 public:
  Head(const AttentionBackwardParams& p, const Sequence& s, int64_t kv_head)
      : p_(p), s_(s), kv_head_(kv_head), group_(p.heads / p.kv_heads), dim_(p.head_dim) {}

  void key_gradients(int64_t first_key) {
    take_keys(first_key);
    d_keys_.clear(dim_);
    d_values_.clear(dim_);
    const int64_t last_token = mistral::min(s_.count, first_key + keys_ + p_.window - 1);
    for (int64_t row = first_key * group_; row < last_token * group_; row += kTile) {
      take_rows(row, last_token * group_);
      score(row, first_key);
      const auto transposed = [](const float* x) {
        return [x](int64_t key, int64_t row) { return x + row * kTile + key; };
      };
      add_product(kTile, rows_, dim_, transposed(probabilities_), d_out_.at, d_values_.at);
      add_product(kTile, rows_, dim_, transposed(d_scores_), q_.at, d_keys_.at);
    }
    const int64_t out = ((s_.first_token + first_key) * p_.kv_heads + kv_head_) * dim_;
    for (int64_t key = 0; key < keys_; ++key) {
      put(d_keys_, key, static_cast<T*>(p_.d_k) + out + key * p_.kv_heads * dim_);
      put(d_values_, key, static_cast<T*>(p_.d_v) + out + key * p_.kv_heads * dim_);
    }
  }

  void query_gradients(int64_t first_row) {
    take_rows(first_row, s_.count * group_);
    d_q_.clear(dim_);
    const int64_t end = (first_row + rows_ - 1) / group_ + 1;
    for (int64_t key = window_begin(first_row / group_, p_.window); key < end; key += kTile) {
      take_keys(key);
      score(first_row, key);
      add_product(
          kTile, keys_, dim_,
          [this](int64_t row, int64_t key) { return d_scores_ + row * kTile + key; }, k_.at,
          d_q_.at);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      put(d_q_, row, static_cast<T*>(p_.d_q) + query_index(first_row + row) * dim_);
    }
  }

 private:
  // The index of a query row in [T, Hq].
  int64_t query_index(int64_t row) const {
    return (s_.first_token + row / group_) * p_.heads + kv_head_ * group_ + row % group_;
  }

  void take_keys(int64_t first) {
    keys_ = mistral::min(kTile, s_.count - first);
    const int64_t token = s_.first_token + first;
    const T* k = static_cast<const T*>(p_.k) + token * p_.stride_k_token;
    const T* v = static_cast<const T*>(p_.v) + token * p_.stride_v_token;
    // The values first: the rows of k_ are read again.
    k_.take(keys_, dim_,
            [&](int64_t key) { return v + key * p_.stride_v_token + kv_head_ * p_.stride_v_head; });
    value_columns_.take(k_, dim_);
    k_.take(keys_, dim_,
            [&](int64_t key) { return k + key * p_.stride_k_token + kv_head_ * p_.stride_k_head; });
    key_columns_.take(k_, dim_);
  }

  // Rows from `first` on, before `end`.
  void take_rows(int64_t first, int64_t end) {
    rows_ = mistral::min(kTile, end - first);
    q_.take(rows_, dim_, [&](int64_t row) {
      const int64_t token = s_.first_token + (first + row) / group_;
      const int64_t head = kv_head_ * group_ + (first + row) % group_;
      return static_cast<const T*>(p_.q) + token * p_.stride_q_token + head * p_.stride_q_head;
    });
    d_out_.take(rows_, dim_, [&](int64_t row) {
      return static_cast<const T*>(p_.d_out) + query_index(first + row) * dim_;
    });
  }

  // Computes the probabilities of a tile, and the gradients of the products of queries and keys.
  void score(int64_t first_row, int64_t first_key) {
    memset(probabilities_, 0, sizeof probabilities_);
    memset(d_scores_, 0, sizeof d_scores_);
    const auto elements = [this](const Rows& rows) {
      return [&rows, dim = dim_](int64_t row, int64_t d) { return rows.at + row * dim + d; };
    };
    add_product(kTile, dim_, kTile, elements(q_), key_columns_.at, probabilities_);
    add_product(kTile, dim_, kTile, elements(d_out_), value_columns_.at, d_scores_);
    for (int64_t row = 0; row < rows_; ++row) differentiate(first_row, row, first_key);
  }

  void differentiate(int64_t first_row, int64_t row, int64_t first_key) {
    const int64_t index = query_index(first_row + row), token = (first_row + row) / group_;
    const Vec lse = broadcast(p_.lse[index]), delta = broadcast(p_.delta[index]);
    const Vec scale = broadcast(p_.scale);
    float* probabilities = probabilities_ + row * kTile;
    float* d_scores = d_scores_ + row * kTile;
    for (int64_t j = 0; j < kTile; j += Vec::width) {
      const Vec probability = exp(load(probabilities + j) * scale - lse);
      store(probabilities + j, probability);
      store(d_scores + j, probability * (load(d_scores + j) - delta) * scale);
    }
    // The row sees the keys [begin, end) of the tile.
    const int64_t begin = window_begin(token, p_.window) - first_key;
    const int64_t end = mistral::min(keys_, token + 1 - first_key);
    for (int64_t j = 0; j < kTile; ++j) {
      if (j >= begin && j < end) continue;
      probabilities[j] = 0.0f;
      d_scores[j] = 0.0f;
    }
  }

  void put(const Rows& rows, int64_t row, T* out) const {
    for (int64_t d = 0; d < dim_; d += Vec::width) store(out + d, load(rows.at + row * dim_ + d));
  }

  const AttentionBackwardParams& p_;
  const Sequence& s_;
  int64_t kv_head_, group_, dim_;
  int64_t rows_, keys_;  // in the tile
  Rows q_, d_out_, k_, d_q_, d_keys_, d_values_;
  Columns key_columns_, value_columns_;
  alignas(64) float probabilities_[kTile * kTile];  // [rows, keys]
  alignas(64) float d_scores_[kTile * kTile];       // [rows, keys]
};

// delta = sum(d_out * out) of every query row
template <class T>
void compute_delta(const AttentionBackwardParams& p, int threads) {
  parallel_for(threads, p.tokens, [&](int64_t token) {
    for (int64_t row = token * p.heads; row < (token + 1) * p.heads; ++row) {
      const T* out = static_cast<const T*>(p.out) + row * p.head_dim;
      const T* d_out = static_cast<const T*>(p.d_out) + row * p.head_dim;
      float delta = 0.0f;
      for (int64_t first = 0; first < p.head_dim; first += kDepth) {
        Vec products = broadcast(0.0f);
        for (int64_t d = first; d < first + kDepth; d += Vec::width) {
          products = fma(load(out + d), load(d_out + d), products);
        }
        delta += sum(products);
      }
      p.delta[row] = delta;
    }
  });
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, int threads) {
  const int64_t group = p.heads / p.kv_heads;
  const auto key_blocks = [&](const Sequence& s) { return ceil_div(s.count, kTile); };
  const auto tasks_of = [&](const Sequence& s) {
    return p.kv_heads * (key_blocks(s) + ceil_div(s.count * group, kTile));
  };
  int64_t tasks = 0;
  for (int64_t i = 0; i < p.num_sequences; ++i) tasks += tasks_of(p.sequences[i]);

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    compute_delta<T>(p, threads);
    parallel_for(threads, tasks, [&](int64_t task) {
      const Sequence* s = p.sequences;
      while (task >= tasks_of(*s)) task -= tasks_of(*s++);
      const int64_t block = task / p.kv_heads;
      Head<T> head(p, *s, task % p.kv_heads);
      if (block < key_blocks(*s)) {
        head.key_gradients(block * kTile);
      } else {
        head.query_gradients((block - key_blocks(*s)) * kTile);
      }
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// A task computes d_k and d_v for a block of keys of one key/value head, or d_q for a block of
// query rows. G query heads share a key/value head. Row r of a sequence belongs to token r / G, and
// is number r mod G of these heads, as in attention.cpp. A task computes all scores that it needs,
// although other tasks compute the same scores. So no two tasks add to the same sum, and the
// results do not depend on the number of threads. A task for keys computes the scores transposed,
// [keys, rows], because the products for d_k and d_v need the probabilities in this order.
//
// A class of products multiplies tiles. VectorProducts computes in fp32. TileProducts is for bf16
// on processors with AMX, and uses the tiles of prefill_amx.h.
#include "../../attention_backward.h"

#include "../kernels.h"
#include "../parallel.h"
#include "rows.h"
#if defined(__AMX_BF16__)
#include "prefill_amx.h"
#endif

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The number of products that are summed before the sum is added to the result. One running sum
// would lose digits. (A::kDepth of arithmetic.h is another number.)
constexpr int64_t kDepth = 32;

// Multiplies with vector instructions, in fp32.
struct VectorProducts {
  using Arithmetic = Fp32;
  static constexpr int64_t kTile = 64;  // the number of query rows or keys in a tile
  // Rows and keys are padded to a multiple of this. Here `score` always computes kTile columns.
  static constexpr int64_t kStep = kTile;

  struct Setup {};

  // out [rows, kTile] = a [rows, D] b, with b [D, kTile]
  static void score(const float* a, int64_t rows, const float* b, int64_t, int64_t dim,
                    float* out) {
    memset(out, 0, static_cast<size_t>(rows * kTile) * sizeof(float));
    add_product(a, rows, dim, dim, b, kTile, out);
  }

  // out [rows, D] += a [rows, kTile] b [kTile, D], but only the first `count` columns of a are
  // multiplied, by the first `count` rows of b.
  static void accumulate(const float* a, int64_t rows, const float* b, int64_t count, int64_t dim,
                         float* out) {
    add_product(a, rows, kTile, count, b, dim, out);
  }

 private:
  // out [rows, columns] += a [rows, depth] b [depth, columns]. Rows of a are stride_a elements
  // apart.
  static void add_product(const float* a, int64_t rows, int64_t stride_a, int64_t depth,
                          const float* b, int64_t columns, float* out) {
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
            [&](int64_t r, int64_t k) { return a + (row + r) * stride_a + first + k; },
            [](int64_t) { return 1.0f; }, out + row * columns);
      }
    }
  }
};

#if defined(__AMX_BF16__)
// Multiplies with AMX tiles. Probabilities and the gradients of scores are rounded to bf16.
struct TileProducts {
  using Arithmetic = Bf16;
  // The number of query rows or keys in a tile. A tile is larger than a tile register of AMX, so
  // that packing is a small part of the work. A task uses 600 KB of L2 with D = 128.
  static constexpr int64_t kTile = 128;
  static constexpr int64_t kStep = AmxProducts::kRowStep;

  using Setup = AmxProducts::Setup;

  // The same products as VectorProducts::score, with b [D / 2, kTile, 2]. Only the first `count`
  // columns are computed.
  static void score(const bf16* a, int64_t rows, const bf16* b, int64_t count, int64_t dim,
                    float* out) {
    AmxProducts::score<kTile>(a, rows, b, count, dim, out);
  }

  // The same products as VectorProducts::accumulate, with b [kTile / 2, D, 2].
  static void accumulate(const bf16* a, int64_t rows, const bf16* b, int64_t count, int64_t dim,
                         float* out) {
    AmxProducts::add<kTile>(a, rows, b, count, dim, out);
  }
};
#endif

// The products class for tensors of type T.
template <class T>
struct ProductsFor {
  using type = VectorProducts;
};
#if defined(__AMX_BF16__)
template <>
struct ProductsFor<bf16> {
  using type = TileProducts;
};
#endif

// Up to kTile neighbouring query rows, keys or values of one head, in the layouts that the products
// need.
template <class Products>
struct Block {
  using A = typename Products::Arithmetic;
  using Element = typename A::Element;
  static constexpr int64_t kTile = Products::kTile;

  alignas(64) Element rows[kTile * kMaxHeadDim];     // [kTile, D], or as pair_rows leaves it
  alignas(64) Element columns[kMaxHeadDim * kTile];  // [D / A::kDepth, kTile, A::kDepth]

  // Copies `count` rows of D elements to `rows`. Row i begins at address(i). Fills up with zeros to
  // `filled` rows.
  template <class Address>
  void take(int64_t count, int64_t filled, int64_t dim, const Address& address) {
    for (int64_t row = 0; row < count; ++row) {
      const auto* from = address(row);
      for (int64_t d = 0; d < dim; d += kStep<A>) {
        A::store(rows + row * dim + d, A::load_row(from + d));
      }
    }
    memset(rows + count * dim, 0, static_cast<size_t>((filled - count) * dim) * sizeof(Element));
  }

  // Writes the transpose of the first `filled` rows to `columns`.
  void make_columns(int64_t filled, int64_t dim) {
    for (int64_t row = 0; row < filled; row += Vec::width) {
      for (int64_t d = 0; d < dim; d += kStep<A>) {
        typename A::Operand square[Vec::width];
        for (int64_t i = 0; i < Vec::width; ++i) square[i] = A::load(rows + (row + i) * dim + d);
        transpose(square);
        for (int64_t i = 0; i < Vec::width; ++i) {
          A::store(columns + (d + i * A::kDepth) * kTile + row * A::kDepth, square[i]);
        }
      }
    }
  }

  // Interleaves each A::kDepth neighbouring rows, in place, for operand b of Products::accumulate:
  // [kTile / A::kDepth, D, A::kDepth].
  void pair_rows(int64_t filled, int64_t dim) {
    if constexpr (A::kDepth > 1) {
      for (int64_t row = 0; row < filled; row += A::kDepth) {
        Element apart[A::kDepth * kMaxHeadDim];
        memcpy(apart, rows + row * dim, static_cast<size_t>(A::kDepth * dim) * sizeof(Element));
        for (int64_t d = 0; d < dim; d += kStep<A>) {
          const Element* from[A::kDepth];
          for (int64_t n = 0; n < A::kDepth; ++n) from[n] = apart + n * dim + d;
          typename A::Operand pairs[A::kDepth];
          A::load_columns(from, pairs);
          for (int64_t n = 0; n < A::kDepth; ++n) {
            A::store(rows + row * dim + d * A::kDepth + n * kStep<A>, pairs[n]);
          }
        }
      }
    }
  }
};

// The gradients of one key/value head of one sequence.
template <class T>
class Head {
  using Products = typename ProductsFor<T>::type;
  using A = typename Products::Arithmetic;
  using Element = typename A::Element;
  static constexpr int64_t kRowStep = Products::kStep;

 public:
  static constexpr int64_t kTile = Products::kTile;

  Head(const AttentionBackwardParams& p, const Sequence& s, int64_t kv_head)
      : p_(p), s_(s), kv_head_(kv_head), group_(p.heads / p.kv_heads), dim_(p.head_dim) {}

  void key_gradients(int64_t first_key) {
    take_keys(first_key, s_.count);
    clear(d_keys_, keys_);
    clear(d_values_, keys_);
    const int64_t last_token = mistral::min(s_.count, window_end(first_key + keys_ - 1, p_.window));
    for (int64_t row = first_key * group_; row < last_token * group_; row += kTile) {
      take_rows(row, last_token * group_);
      q_.make_columns(filled(rows_), dim_);
      d_out_.make_columns(filled(rows_), dim_);
      q_.pair_rows(filled(rows_), dim_);
      d_out_.pair_rows(filled(rows_), dim_);
      // Keys of the tile from index `seen` on are later than all of its rows, so no row sees them.
      const int64_t seen = mistral::min(keys_, (row + rows_ - 1) / group_ + 1 - first_key);
      Products::score(k_.rows, filled(seen), q_.columns, filled(rows_), dim_, scores_);
      Products::score(v_.rows, filled(seen), d_out_.columns, filled(rows_), dim_, d_products_);
      for (int64_t key = 0; key < seen; ++key) {
        differentiate(
            key, filled(rows_), [this](int64_t i) { return load(lse_ + i); },
            [this](int64_t i) { return load(delta_ + i); });
        // Only the tokens [own, window_end) see the key.
        const int64_t own = first_key + key;
        hide(key, own * group_ - row,
             mistral::min(last_token, window_end(own, p_.window)) * group_ - row, filled(rows_));
      }
      for (int64_t key = seen; key < filled(seen); ++key) hide(key, 0, 0, filled(rows_));
      Products::accumulate(probabilities_, filled(seen), d_out_.rows, filled(rows_), dim_,
                           d_values_);
      Products::accumulate(d_scores_, filled(seen), q_.rows, filled(rows_), dim_, d_keys_);
    }
    const int64_t out = ((s_.first_token + first_key) * p_.kv_heads + kv_head_) * dim_;
    for (int64_t key = 0; key < keys_; ++key) {
      put(d_keys_, key, static_cast<T*>(p_.d_k) + out + key * p_.kv_heads * dim_);
      put(d_values_, key, static_cast<T*>(p_.d_v) + out + key * p_.kv_heads * dim_);
    }
  }

  void query_gradients(int64_t first_row) {
    take_rows(first_row, s_.count * group_);
    clear(d_q_, rows_);
    const int64_t end = (first_row + rows_ - 1) / group_ + 1;
    for (int64_t key = window_begin(first_row / group_, p_.window); key < end; key += kTile) {
      take_keys(key, end);
      k_.make_columns(filled(keys_), dim_);
      v_.make_columns(filled(keys_), dim_);
      k_.pair_rows(filled(keys_), dim_);
      Products::score(q_.rows, filled(rows_), k_.columns, filled(keys_), dim_, scores_);
      Products::score(d_out_.rows, filled(rows_), v_.columns, filled(keys_), dim_, d_products_);
      for (int64_t row = 0; row < rows_; ++row) {
        const Vec lse = broadcast(lse_[row]), delta = broadcast(delta_[row]);
        differentiate(
            row, filled(keys_), [lse](int64_t) { return lse; }, [delta](int64_t) { return delta; });
        const int64_t token = (first_row + row) / group_;
        hide(row, window_begin(token, p_.window) - key, mistral::min(keys_, token + 1 - key),
             filled(keys_));
      }
      for (int64_t row = rows_; row < filled(rows_); ++row) hide(row, 0, 0, filled(keys_));
      Products::accumulate(d_scores_, filled(rows_), k_.rows, filled(keys_), dim_, d_q_);
    }
    for (int64_t row = 0; row < rows_; ++row) {
      put(d_q_, row, static_cast<T*>(p_.d_q) + query_index(first_row + row) * dim_);
    }
  }

 private:
  static int64_t filled(int64_t rows) { return ceil_div(rows, kRowStep) * kRowStep; }

  void clear(float* sums, int64_t rows) const {
    memset(sums, 0, static_cast<size_t>(filled(rows) * dim_) * sizeof(float));
  }

  // The index of a query row in [T, Hq].
  int64_t query_index(int64_t row) const {
    return (s_.first_token + row / group_) * p_.heads + kv_head_ * group_ + row % group_;
  }

  // Takes the keys and values of a tile: those at [first, end), but at most kTile.
  void take_keys(int64_t first, int64_t end) {
    keys_ = mistral::min(kTile, end - first);
    const int64_t token = s_.first_token + first;
    const T* k =
        static_cast<const T*>(p_.k) + token * p_.stride_k_token + kv_head_ * p_.stride_k_head;
    const T* v =
        static_cast<const T*>(p_.v) + token * p_.stride_v_token + kv_head_ * p_.stride_v_head;
    k_.take(keys_, filled(keys_), dim_, [&](int64_t key) { return k + key * p_.stride_k_token; });
    v_.take(keys_, filled(keys_), dim_, [&](int64_t key) { return v + key * p_.stride_v_token; });
  }

  // Takes the query rows of a tile, [first, end), but at most kTile: their queries, gradients,
  // log-sum-exps and deltas.
  void take_rows(int64_t first, int64_t end) {
    rows_ = mistral::min(kTile, end - first);
    q_.take(rows_, filled(rows_), dim_, [&](int64_t row) {
      const int64_t token = s_.first_token + (first + row) / group_;
      const int64_t head = kv_head_ * group_ + (first + row) % group_;
      return static_cast<const T*>(p_.q) + token * p_.stride_q_token + head * p_.stride_q_head;
    });
    d_out_.take(rows_, filled(rows_), dim_, [&](int64_t row) {
      return static_cast<const T*>(p_.d_out) + query_index(first + row) * dim_;
    });
    for (int64_t row = 0; row < filled(rows_); ++row) {
      const int64_t index = query_index(first + row);
      // An infinite log-sum-exp makes the probabilities of a padding row 0.
      lse_[row] = row < rows_ ? p_.lse[index] : INFINITY;
      delta_[row] = row < rows_ ? p_.delta[index] : 0.0f;
    }
  }

  // Computes one line (row) of probabilities_ and of d_scores_, for the first `count` columns, from
  // scores_ and d_products_. lse(i) and delta(i) return vectors with the values for the columns
  // from i on.
  template <class Lse, class Delta>
  void differentiate(int64_t line, int64_t count, const Lse& lse, const Delta& delta) {
    const Vec scale = broadcast(p_.scale);
    for (int64_t j = line * kTile; j < line * kTile + count; j += kStep<A>) {
      Vec p[A::kDepth], d_scores[A::kDepth];
      for (int64_t n = 0; n < A::kDepth; ++n) {
        const int64_t at = j + n * Vec::width, column = at - line * kTile;
        p[n] = exp(load(scores_ + at) * scale - lse(column));
        d_scores[n] = p[n] * (load(d_products_ + at) - delta(column)) * scale;
      }
      A::store(probabilities_ + j, A::convert(p));
      A::store(d_scores_ + j, A::convert(d_scores));
    }
  }

  // Sets columns of a line to zero: those of the first `count` columns that are outside [begin,
  // end).
  void hide(int64_t line, int64_t begin, int64_t end, int64_t count) {
    const auto clear_columns = [&](int64_t first, int64_t last) {
      for (int64_t j = line * kTile + first; j < line * kTile + last; ++j) {
        probabilities_[j] = Element{};
        d_scores_[j] = Element{};
      }
    };
    clear_columns(0, mistral::min(begin, count));
    clear_columns(mistral::max(end, int64_t{0}), count);
  }

  void put(const float* sums, int64_t row, T* out) const {
    for (int64_t d = 0; d < dim_; d += Vec::width) store(out + d, load(sums + row * dim_ + d));
  }

  const AttentionBackwardParams& p_;
  const Sequence& s_;
  int64_t kv_head_, group_, dim_;
  int64_t rows_, keys_;  // the numbers of rows and keys in the tile
  Block<Products> q_, d_out_, k_, v_;
  // The log-sum-exp of each query row of the tile, and its delta (compute_delta).
  alignas(64) float lse_[kTile];
  alignas(64) float delta_[kTile];
  // d_q_ is [rows, D], the others are [keys, D]
  alignas(64) float d_q_[kTile * kMaxHeadDim];
  alignas(64) float d_keys_[kTile * kMaxHeadDim];
  alignas(64) float d_values_[kTile * kMaxHeadDim];
  // [rows, keys] in tasks for queries, [keys, rows] in tasks for keys
  alignas(64) float scores_[kTile * kTile];
  alignas(64) float d_products_[kTile * kTile];  // d_out v^T, or its transpose
  alignas(64) Element probabilities_[kTile * kTile];
  alignas(64) Element d_scores_[kTile * kTile];
};

// Writes delta = sum(d_out * out) for every query row.
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
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kTile = Head<T>::kTile;
    const auto key_blocks = [&](const Sequence& s) { return ceil_div(s.count, kTile); };
    const auto tasks_of = [&](const Sequence& s) {
      return p.kv_heads * (key_blocks(s) + ceil_div(s.count * group, kTile));
    };
    int64_t tasks = 0;
    for (int64_t i = 0; i < p.num_sequences; ++i) tasks += tasks_of(p.sequences[i]);

    compute_delta<T>(p, threads);
    parallel_for(threads, tasks, [&](int64_t task) {
      const Sequence* s = p.sequences;
      while (task >= tasks_of(*s)) task -= tasks_of(*s++);
      const int64_t block = task / p.kv_heads;
      [[maybe_unused]] typename ProductsFor<T>::type::Setup setup;
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

// Attention with many query rows, as in prefill. Arithmetic limits the speed. A tile is kKeys
// neighbouring keys with their values. The keys of a tile are transposed once for all rows. Then
// both products can be computed as sums of rows of a matrix, each row multiplied by one number. The
// scores are sums of rows of the transposed keys, multiplied by elements of q. The outputs are sums
// of values, multiplied by probabilities. So no sum runs across the lanes of a vector.
//
// Tiles begin at multiples of kKeys, counted from position 0. So it does not matter where the chunk
// begins, or whether a key lies in the ring or in the chunk. The order of the additions of a row is
// the same however a prompt is cut into chunks, and the result has the same bits.
//
// A class of products multiplies a tile: VectorProducts here, or AmxProducts in prefill_amx.h.
#pragma once

#include "rows.h"
#if defined(__AMX_BF16__)
#include "prefill_amx.h"
#endif

namespace mistral::cpu::MISTRAL_ISA {

// Multiplies with vector instructions. A is Fp32 or Bf16 of arithmetic.h, which also explains
// kDepth and Operand.
template <class A>
struct VectorProducts {
  using Element = typename A::Element;
  // The number of rows is padded to a multiple of kRowStep, the number of keys to one of kKeyStep.
  static constexpr int64_t kRowStep = kRowBlock;
  static constexpr int64_t kKeyStep = A::kDepth;

  struct Setup {};

  // scores [rows, kKeys] = q [rows, D] k^T, for the first `count` keys. k is [D / kDepth, kKeys,
  // kDepth].
  template <int64_t kKeys>
  static void score(const Element* q, int64_t rows, const Element* k, int64_t count, int64_t dim,
                    float* scores) {
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      score_rows<kKeys>(q + row * dim, k, count, dim, scores + row * kKeys);
    }
  }

  // out [rows, D] = factors * out + p [rows, kKeys] v, for the first `count` keys. v is [kKeys /
  // kDepth, D, kDepth].
  template <int64_t kKeys>
  static void accumulate(const Element* p, const float* factors, int64_t rows, const Element* v,
                         int64_t count, int64_t dim, float* out) {
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      add_weighted<A>(
          count, dim,
          [&](int64_t key, int64_t d, auto& columns) {
            const Element* values = v + key * dim + d * A::kDepth;
            for (auto& column : columns) {
              column = A::load(values);
              values += kStep<A>;
            }
          },
          [&](int64_t r, int64_t key) { return p + (row + r) * kKeys + key; },
          [&](int64_t r) { return factors[row + r]; }, out + row * dim);
    }
  }

 private:
  template <int64_t kKeys>
  static void score_rows(const Element* q, const Element* k, int64_t count, int64_t dim,
                         float* scores) {
    constexpr int64_t M = mistral::min(kKeys / Vec::width, kColumnVectors);
    for (int64_t key = 0; key < count; key += M * Vec::width) {
      Vec sums[kRowBlock][M];
      for (auto& of_row : sums) {
        for (Vec& sum : of_row) sum = broadcast(0.0f);
      }
      for (int64_t d = 0; d < dim; d += A::kDepth) {
        typename A::Operand keys[M];
        for (int64_t m = 0; m < M; ++m) {
          keys[m] = A::load(k + d * kKeys + key * A::kDepth + m * kStep<A>);
        }
        for (int64_t r = 0; r < kRowBlock; ++r) {
          const auto x = A::splat(q + r * dim + d);
          for (int64_t m = 0; m < M; ++m) sums[r][m] = A::multiply_add(x, keys[m], sums[r][m]);
        }
      }
      for (int64_t r = 0; r < kRowBlock; ++r) {
        for (int64_t m = 0; m < M; ++m) {
          store(scores + r * kKeys + key + m * Vec::width, sums[r][m]);
        }
      }
    }
  }
};

// The products class for tensors of type T.
template <class T>
struct ProductsOf {
  using type = VectorProducts<typename ArithmeticOf<T>::type>;
};
#if defined(__AMX_BF16__)
template <>
struct ProductsOf<bf16> {
  using type = AmxProducts;
};
#endif

// Up to kRows query rows, and what they have attended to so far.
template <class T>
class PrefillRows {
  using A = typename ArithmeticOf<T>::type;
  using Products = typename ProductsOf<T>::type;
  using Element = typename A::Element;

 public:
  using Arithmetic = A;
  static constexpr int64_t kRows = 128;
  static constexpr int64_t kRowStep = Products::kRowStep;

  alignas(64) Element q[kRows * kMaxHeadDim];  // [rows, D]
  alignas(64) float out[kRows * kMaxHeadDim];  // [rows, D], not yet divided by the totals
  int64_t rows;                                // the number of rows, a multiple of kRowStep

  float maximum(int64_t row) const { return maximum_[row]; }
  float total(int64_t row) const { return total_[row]; }

  void clear(int64_t dim) {
    for (int64_t i = 0; i < rows * dim; ++i) out[i] = 0.0f;
    for (int64_t row = 0; row < rows; ++row) {
      maximum_[row] = -INFINITY;
      total_[row] = 0.0f;
    }
  }

  // Adds the keys at positions [begin, end) to the attention of all rows. position_of(row) is the
  // position of a row. key_at(position) returns the addresses of a key and its value.
  template <class KeyAt, class PositionOf>
  void attend(int64_t begin, int64_t end, const KeyAt& key_at, int64_t dim, int64_t window,
              float scale, const PositionOf& position_of) {
    [[maybe_unused]] typename Products::Setup setup;
    Tile tile, next;
    const int64_t first = begin - begin % kKeys;
    find_keys(first, begin, end, key_at, tile);
    for (int64_t position = first; position < end; position += kKeys, tile = next) {
      const int64_t there = mistral::min(kKeys, end - position);
      const int64_t count = ceil_div(there, Products::kKeyStep) * Products::kKeyStep;
      find_keys(position + kKeys, begin, end, key_at, next);
      pack_keys(tile, next, count, dim);
      Products::template score<kKeys>(q, rows, k_, count, dim, scores_);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t own = position_of(row);
        hide(row, window_begin(own, window) - position, mistral::min(there, own + 1 - position));
        fold(row, scale);
      }
      pack_values(tile, next, count, dim);
      Products::template accumulate<kKeys>(probabilities_, factors_, rows, v_, count, dim, out);
    }
  }

 private:
  // The number of keys in a tile. A packed tile must fit the L1 cache.
  static constexpr int64_t kKeys = 32 * A::kDepth;

  struct Tile {
    KeyValue<T> keys[kKeys];
  };

  // Finds the kKeys keys from `position` on. A position outside [begin, end) gets the nearest key
  // inside. Scores with such a key are hidden later.
  template <class KeyAt>
  static void find_keys(int64_t position, int64_t begin, int64_t end, const KeyAt& key_at,
                        Tile& tile) {
    for (int64_t i = 0; i < kKeys; ++i) {
      tile.keys[i] = key_at(mistral::min(mistral::max(position + i, begin), end - 1));
    }
  }

  // Packs (transposes) the first `count` keys of a tile, and prefetches the keys of the next tile.
  void pack_keys(const Tile& tile, const Tile& next, int64_t count, int64_t dim) {
    for (int64_t key = 0; key < count; key += Vec::width) {
      for (int64_t i = 0; i < Vec::width; ++i) prefetch(next.keys[key + i].k, dim);
      for (int64_t d = 0; d < dim; d += kStep<A>) {
        typename A::Operand square[Vec::width];
        for (int64_t i = 0; i < Vec::width; ++i) square[i] = A::load_row(tile.keys[key + i].k + d);
        transpose(square);
        for (int64_t i = 0; i < Vec::width; ++i) {
          A::store(k_ + (d + i * A::kDepth) * kKeys + key * A::kDepth, square[i]);
        }
      }
    }
  }

  // Interleaves each kDepth neighbouring values of a tile, and prefetches the values of the next
  // tile.
  void pack_values(const Tile& tile, const Tile& next, int64_t count, int64_t dim) {
    for (int64_t key = 0; key < count; key += A::kDepth) {
      const T* values[A::kDepth];
      for (int64_t i = 0; i < A::kDepth; ++i) {
        values[i] = tile.keys[key + i].v;
        prefetch(next.keys[key + i].v, dim);
      }
      for (int64_t d = 0; d < dim; d += kStep<A>) {
        typename A::Operand columns[A::kDepth];
        A::load_columns(values, columns);
        for (int64_t i = 0; i < A::kDepth; ++i) {
          A::store(v_ + key * dim + d * A::kDepth + i * kStep<A>, columns[i]);
          values[i] += kStep<A>;
        }
      }
    }
  }

  // Hides the scores of a row, except those of the keys [begin, end) of the tile, which the row
  // sees.
  void hide(int64_t row, int64_t begin, int64_t end) {
    float* scores = scores_ + row * kKeys;
    for (int64_t j = 0; j < mistral::min(begin, kKeys); ++j) scores[j] = -INFINITY;
    for (int64_t j = mistral::max(end, 0); j < kKeys; ++j) scores[j] = -INFINITY;
  }

  // Folds the scores of a row into its running softmax. Writes the probabilities, relative to the
  // maximum of all scores so far. Also writes a factor. The earlier sums of the row are relative to
  // the earlier maximum, so they must be multiplied by this factor.
  void fold(int64_t row, float scale) {
    const float* scores = scores_ + row * kKeys;
    Vec highest = broadcast(maximum_[row]);
    for (int64_t j = 0; j < kKeys; j += Vec::width) {
      highest = vmax(highest, load(scores + j) * broadcast(scale));
    }
    const float maximum = largest(highest);
    const Vec base = finite(broadcast(maximum));
    Vec total = broadcast(0.0f);
    for (int64_t j = 0; j < kKeys; j += kStep<A>) {
      Vec p[A::kDepth];
      for (int64_t n = 0; n < A::kDepth; ++n) {
        p[n] = exp(load(scores + j + n * Vec::width) * broadcast(scale) - base);
        total = total + p[n];
      }
      A::store(probabilities_ + row * kKeys + j, A::convert(p));
    }
    factors_[row] = largest(exp(broadcast(maximum_[row]) - base));
    maximum_[row] = maximum;
    total_[row] = total_[row] * factors_[row] + sum(total);
  }

  alignas(64) Element k_[kKeys * kMaxHeadDim];  // [D / kDepth, kKeys, kDepth]
  alignas(64) Element v_[kKeys * kMaxHeadDim];  // [kKeys / kDepth, D, kDepth]
  alignas(64) float scores_[kRows * kKeys];     // [rows, kKeys]
  alignas(64) Element probabilities_[kRows * kKeys];
  float maximum_[kRows];
  float total_[kRows];
  float factors_[kRows];
};

}  // namespace mistral::cpu::MISTRAL_ISA

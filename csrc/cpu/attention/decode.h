// Attention with few query rows, as in decode. Reading the keys and values limits the speed. They
// are multiplied in the layout of memory, in blocks that stay in the L1 cache, while the next block
// is fetched.
//
// A vector holds the scores of kRowBlock rows and kGroup keys, [row][key]. So each instruction of a
// softmax serves kRowBlock rows. (In scalar code a vector has one lane, and so one score.)
#pragma once

#include "rows.h"

namespace mistral::cpu::MISTRAL_ISA {

// Loads an operand into a register. Without the asm, GCC 12 would load the operand again for each
// product. Then loads, not products, would limit the speed.
template <class A>
MISTRAL_SIMD typename A::Operand load_once(const typename A::Element* x) {
  typename A::Operand operand = A::load(x);
#if defined(__AVX2__) && !defined(__clang__)
  asm("" : "+v"(operand.v));
#endif
  return operand;
}

// Up to kRows query rows, and what they have attended to so far.
template <class T>
class DecodeRows {
  using A = typename ArithmeticOf<T>::type;
  using Element = typename A::Element;

 public:
  using Arithmetic = A;
  static constexpr int64_t kRows = 16;
  static constexpr int64_t kRowStep = kRowBlock;

  alignas(64) Element q[kRows * kMaxHeadDim];  // [rows, D]
  alignas(64) float out[kRows * kMaxHeadDim];  // [rows, D], not yet divided by the totals
  int64_t rows;                                // the number of rows, a multiple of kRowStep

  float maximum(int64_t row) const { return maximum_[row * kGroup]; }
  float total(int64_t row) const {
    float sum = 0.0f;
    for (int64_t j = 0; j < kGroup; ++j) sum += total_[row * kGroup + j];
    return sum;
  }

  void clear(int64_t dim) {
    for (int64_t i = 0; i < rows * dim; ++i) out[i] = 0.0f;
    for (int64_t i = 0; i < rows * kGroup; ++i) {
      maximum_[i] = -INFINITY;
      total_[i] = 0.0f;
    }
  }

  // Adds `keys` to the attention of all rows. position_of(row) is the position of a row. No row has
  // a lower position than the row before it.
  //
  // The products with the values of a block must wait for its softmax (`fold`), which is a long
  // chain of steps. The scores of the next block do not need this softmax. So the code computes
  // them first, and the processor has work while it waits.
  template <class PositionOf>
  void attend(const Keys<T>& keys, int64_t dim, int64_t window, float scale,
              const PositionOf& position_of) {
    if (keys.count <= 0) return;
    const int64_t lowest = position_of(0), highest = position_of(rows - 1);
    for (int64_t row = 0; row < rows; row += kRowBlock) score(keys, 0, row, dim);
    for (int64_t first = 0; first < keys.count; first += kKeys) {
      const int64_t count = mistral::min(kKeys, keys.count - first);
      const int64_t position = keys.position + first;
      const bool all_visible = count == kKeys && window_begin(highest, window) <= position &&
                               position + count <= lowest + 1;
      for (int64_t row = 0; row < rows && !all_visible; ++row) {
        const int64_t own = position_of(row);
        hide(row, window_begin(own, window) - position, mistral::min(count, own + 1 - position));
      }
      for (int64_t row = 0; row < rows; row += kRowBlock) fold(row, scale);
      for (int64_t row = 0; row < rows; row += kRowBlock) {
        score(keys, first + kKeys, row, dim);
        accumulate(keys, first, row, dim);
      }
    }
  }

 private:
  // The number of keys in a block. At D = 128 in bf16, 16 keys fill a page of memory, and so do
  // their values. Larger blocks were slower.
  static constexpr int64_t kKeys = 16;
  static constexpr int64_t kGroup = Vec::width == 1 ? 1 : Vec::width / kRowBlock;
  static constexpr int64_t kLanes = kRowBlock * kGroup;

  // The number of neighbouring keys whose probabilities lie side by side for each row. An operand
  // holds kDepth of them, so there must be at least as many.
  static constexpr int64_t kNeighbours = mistral::max(kGroup, A::kDepth);
  static_assert(kKeys % kNeighbours == 0, "");

  // scores = q k^T for kRowBlock rows and the block of keys from `first` on, if there are any. If
  // the last group of keys is incomplete, its last key is repeated. `attend` hides the scores of
  // the repetitions.
  //
  // This block is read in another order than that of addresses: kGroup keys at a time. But the next
  // block is prefetched in the order of addresses, so that the hardware prefetchers take part. This
  // is worth 15 %. The code assumes that the next block follows in memory, as it does in a ring. A
  // chunk with few query rows has no next block.
  //
  // This function and `accumulate` are not inlined. Inlined, they would share too few registers for
  // their addresses.
  [[gnu::noinline]] void score(const Keys<T>& keys, int64_t first, int64_t row, int64_t dim) {
    const int64_t count = mistral::min(kKeys, keys.count - first);
    const T* k = keys.k + first * keys.stride_k;
    const T* next = k + kKeys * dim;
    for (int64_t key = 0; key < count; key += kGroup) {
      prefetch(next + key * dim, kGroup * dim);
      const T* group[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) {
        group[j] = k + mistral::min(key + j, count - 1) * keys.stride_k;
      }
      Vec partial[kLanes];
      for (Vec& lanes : partial) lanes = broadcast(0.0f);
      for (int64_t d = 0; d < dim; d += kStep<A>) {
        typename A::Operand x[kGroup];
        for (int64_t j = 0; j < kGroup; ++j) x[j] = A::load_row(group[j] + d);
        for (int64_t r = 0; r < kRowBlock; ++r) {
          const auto y = load_once<A>(q + (row + r) * dim + d);
          for (int64_t j = 0; j < kGroup; ++j) {
            partial[r * kGroup + j] = A::multiply_add(x[j], y, partial[r * kGroup + j]);
          }
        }
      }
      for (int64_t i = 0; i < kLanes; i += Vec::width) {
        store(scores_ + row * kKeys + key * kRowBlock + i, sums(partial + i));
      }
    }
  }

  // Hides the scores of a row, except those of the keys [begin, end) of the block, which the row
  // sees.
  void hide(int64_t row, int64_t begin, int64_t end) {
    const int64_t r = row % kRowBlock;
    const auto score_of = [&](int64_t key) -> float& {
      return scores_[(row - r) * kKeys + key / kGroup * kLanes + r * kGroup + key % kGroup];
    };
    for (int64_t key = 0; key < mistral::min(begin, kKeys); ++key) score_of(key) = -INFINITY;
    for (int64_t key = mistral::max(end, 0); key < kKeys; ++key) score_of(key) = -INFINITY;
  }

  // Folds the scores of a block, for kRowBlock rows from `row` on, into the running softmax. Writes
  // the probabilities, relative to the maximum of all scores so far. Also writes a factor for each
  // row. The earlier sums of the row are relative to the earlier maximum, so they must be
  // multiplied by this factor.
  void fold(int64_t row, float scale) {
    const float* scores = scores_ + row * kKeys;
    Element* probabilities = probabilities_ + row * kKeys;
    for (int64_t i = 0; i < kLanes; i += Vec::width) {
      float* maximum = maximum_ + row * kGroup + i;
      float* total = total_ + row * kGroup + i;
      const Vec before = load(maximum);
      Vec highest = before;
      for (int64_t j = i; j < kKeys * kRowBlock; j += kLanes) {
        highest = vmax(highest, load(scores + j) * broadcast(scale));
      }
      highest = largest_of_quarter(highest);
      const Vec base = finite(highest), factor = exp(before - base);
      Vec sum = load(total) * factor;
      for (int64_t j = i; j < kKeys * kRowBlock; j += A::kDepth * kLanes) {
        Vec p[A::kDepth];
        for (int64_t n = 0; n < A::kDepth; ++n) {
          p[n] = exp(load(scores + j + n * kLanes) * broadcast(scale) - base);
          sum = sum + p[n];
        }
        if constexpr (kGroup < A::kDepth) {
          // Each vector p has one key, and a lane for each row. Interleaved, the probabilities of
          // two neighbouring keys lie side by side.
          static_assert(kGroup == 1 && A::kDepth == 2 && kLanes == Vec::width, "");
          const Vec first = p[0], second = p[1];
          interleave(first, second, p);
        }
        A::store(probabilities + j, A::convert(p));
      }
      store(maximum, highest);
      store(total, sum);
      store(factors_ + row * kGroup + i, factor);
    }
  }

  // out = factor * out + p v, for kRowBlock rows and the block of values from `first` on. If the
  // last kNeighbours values are incomplete, the last value is repeated, and the probabilities of
  // the repetitions are 0.
  [[gnu::noinline]] void accumulate(const Keys<T>& keys, int64_t first, int64_t row, int64_t dim) {
    const int64_t count = mistral::min(kKeys, keys.count - first);
    const T* v = keys.v + first * keys.stride_v;
    const T* next = v + kKeys * dim;
    const T* values[kKeys];
    for (int64_t key = 0; key < kKeys; ++key) {
      values[key] = v + mistral::min(key, count - 1) * keys.stride_v;
    }
    add_weighted<A, kNeighbours>(
        count, dim,
        [&](int64_t key, int64_t d, auto& columns) {
          constexpr int64_t M = sizeof columns / sizeof columns[0];
          prefetch(next, A::kDepth * M * Vec::width);
          next += A::kDepth * M * Vec::width;
          for (int64_t m = 0; m < M; m += A::kDepth) {
            const T* from[A::kDepth];
            for (int64_t i = 0; i < A::kDepth; ++i) from[i] = values[key + i] + d + m * Vec::width;
            A::load_columns(from, columns + m);
          }
        },
        [&](int64_t r, int64_t key) {
          return probabilities_ + row * kKeys + key * kRowBlock + r * kNeighbours;
        },
        [&](int64_t r) { return factors_[(row + r) * kGroup]; }, out + row * dim);
  }

  // The next three arrays have the layout of a vector of scores: a lane for each row and key of a
  // group. All lanes of a row hold the same maximum and factor. The total of a row is the sum of
  // its lanes.
  alignas(64) float maximum_[kRows * kGroup];
  alignas(64) float total_[kRows * kGroup];
  alignas(64) float factors_[kRows * kGroup];
  alignas(64) float scores_[kRows * kKeys];
  alignas(64) Element probabilities_[kRows * kKeys];
};

}  // namespace mistral::cpu::MISTRAL_ISA

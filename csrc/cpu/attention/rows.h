// Code that the attention kernels for few and for many query rows share.
//
// Both kernels compute an online softmax. For each row they keep the maximum of its scores so far,
// and two sums relative to this maximum: of the probabilities, and of the weighted values.
#pragma once

#include "../simd/arithmetic.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kRowBlock = 4;  // the number of query rows that are multiplied at once
// The number of vectors of columns that are computed together. With kRowBlock rows, their sums take
// at most half of the vector registers. The rest is for factors.
constexpr int64_t kColumnVectors = Vec::width == 16 || Vec::width == 4 ? 4 : 2;

// A row that has seen no key yet has the maximum -inf. Its probabilities would be exp(-inf + inf) =
// NaN. With any finite number in place of the maximum they are exp(-inf) = 0.
MISTRAL_SIMD Vec finite(Vec maximum) { return vmax(maximum, broadcast(-3e38f)); }

// Keys and values of consecutive positions. Neighbours are stride_k or stride_v elements apart.
template <class T>
struct Keys {
  const T* k;
  const T* v;
  int64_t stride_k;
  int64_t stride_v;
  int64_t position;  // of the first key
  int64_t count;
};

// One key and its value.
template <class T>
struct KeyValue {
  const T* k;
  const T* v;
};

template <class T>
MISTRAL_SIMD void prefetch(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t{sizeof(T)}) __builtin_prefetch(x + i);
}

// out = factor * out + weights * values, for kRowBlock rows and M vectors of columns, from column d
// on. In attention the weights are probabilities. Three functions give the numbers:
//
//   factor(r)                the factor of row r
//   weights(r, key)          the address of the weights of row r for kNeighbours keys from `key` on
//   values(key, d, columns)  loads the values of kDepth keys from `key` on, as M operands
//
// If `keys` is no multiple of kNeighbours, weights and values must exist up to the next multiple,
// and these weights must be 0.
//
// The new products are summed on their own and added to `out` at the end. If thousands of keys were
// added to `out` one by one, each addition would round this large number.
template <int64_t M, class A, int64_t kNeighbours, class Values, class Weights, class Factor>
MISTRAL_SIMD void add_weighted_columns(int64_t keys, int64_t dim, int64_t d, const Values& values,
                                       const Weights& weights, const Factor& factor, float* out) {
  Vec sums[kRowBlock][M];
  for (auto& of_row : sums) {
    for (Vec& sum : of_row) sum = broadcast(0.0f);
  }
  for (int64_t key = 0; key < keys; key += kNeighbours) {
    for (int64_t n = 0; n < kNeighbours; n += A::kDepth) {
      typename A::Operand columns[M];
      values(key + n, d, columns);
      for (int64_t r = 0; r < kRowBlock; ++r) {
        const auto weight = A::splat(weights(r, key) + n);
        for (int64_t m = 0; m < M; ++m) {
          sums[r][m] = A::multiply_add(weight, columns[m], sums[r][m]);
        }
      }
    }
  }
  for (int64_t r = 0; r < kRowBlock; ++r) {
    for (int64_t m = 0; m < M; ++m) {
      float* total = out + r * dim + d + m * Vec::width;
      store(total, fma(load(total), broadcast(factor(r)), sums[r][m]));
    }
  }
}

// Calls add_weighted_columns for all columns.
template <class A, int64_t kNeighbours = A::kDepth, class Values, class Weights, class Factor>
MISTRAL_SIMD void add_weighted(int64_t keys, int64_t dim, const Values& values,
                               const Weights& weights, const Factor& factor, float* out) {
  constexpr int64_t M = kColumnVectors;
  int64_t d = 0;
  for (; d + M * Vec::width <= dim; d += M * Vec::width) {
    add_weighted_columns<M, A, kNeighbours>(keys, dim, d, values, weights, factor, out);
  }
  if (d < dim)
    add_weighted_columns<M / 2, A, kNeighbours>(keys, dim, d, values, weights, factor, out);
}

}  // namespace mistral::cpu::MISTRAL_ISA

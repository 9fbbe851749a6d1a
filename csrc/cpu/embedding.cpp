// A task writes the embeddings of a block of tokens, which are rows of the matrix.
#include "../embedding.h"

#include "kernels.h"
#include "linear/unpack.h"
#include "parallel.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The most values of a task. (A task has whole rows, so a single row may have more.) A smaller task
// is not worth another thread: while that thread wakes up, the caller reads as many values. A
// decode step of 8 tokens of Mistral 7B is just one task, which the caller runs.
constexpr int64_t kTaskValues = 1 << 15;

// Puts 8 unpacked vectors into the order of the row. Before, lane l of vector i is value i of word
// l (formats.h). In the row, the 8 values of a word are neighbours. So this is a transpose, from
// [8, width] to [width, 8]. Each round interleaves the first half of all values with the second
// half, and 8 = 2^3 vectors take three rounds.
MISTRAL_SIMD void to_order_of_row(Vec values[8]) {
  for (int round = 0; round < 3; ++round) {
    Vec next[8];
    for (int i = 0; i < 4; ++i) interleave(values[i], values[i + 4], next + 2 * i);
    for (int i = 0; i < 8; ++i) values[i] = next[i];
  }
}

template <class T>
void read_row(const WeightRows& row, Unpack<float> unpack, bool in_order, T* out) {
  for (int64_t k = 0; k < row.inputs; k += kUnpacked) {
    alignas(64) float unpacked[kUnpacked];
    unpack(row, k, unpacked);
    Vec values[8];
    for (int i = 0; i < 8; ++i) values[i] = load(unpacked + i * Vec::width);
    if (!in_order) to_order_of_row(values);
    for (int i = 0; i < 8; ++i) {
      const int64_t first = k + i * Vec::width, left = row.inputs - first;
      if (left >= Vec::width) {
        store(out + first, values[i]);
      } else if (left > 0) {
        store_first(out + first, values[i], left);
      }
    }
  }
}

template <class T>
void read_rows(const EmbeddingParams& p, int64_t begin, int64_t end) {
  const WeightRows rows = rows_of<T>(p.weight, p.dim, 0);
  const Unpack<float> unpack = unpack_of<T, float>(p.weight.format);
  const bool in_order =
      with_format(p.weight.format, [](auto format) { return kUnpacksInOrder<format.value>; });
  for (int64_t token = begin; token < end; ++token) {
    const WeightRows row = rows.from(p.token_ids[token]);
    T* const out = static_cast<T*>(p.out) + token * p.dim;
    if (p.weight.format == WeightFormat::plain) {
      memcpy(out, row.values, static_cast<size_t>(row.row_bytes));
    } else {
      read_row(row, unpack, in_order, out);
    }
  }
}

}  // namespace

void embedding(const EmbeddingParams& p, int threads) {
  if (p.dim == 0) return;
  const int64_t rows = mistral::max(1, kTaskValues / p.dim);
  with_dtype(p.dtype, [&](auto type) {
    parallel_for(threads, ceil_div(p.tokens, rows), [&](int64_t task) {
      read_rows<decltype(type)>(p, task * rows, mistral::min((task + 1) * rows, p.tokens));
    });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

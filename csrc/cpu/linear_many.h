// The product of many tokens with rows of a weight, in blocks that stay in the caches:
//
//   for each block of kBlockDepth values of k
//     unpack the block of all rows into the L2 cache, whatever their format
//     for each M vectors of tokens (their block stays in the L1 cache)
//       for each R rows: multiply, with the R x M sums in registers
//
// The lanes of a vector are tokens; a value of a weight is broadcast to all of them. So weights
// need no other order than that of their file, and only activations are packed:
//
//   x [K / kBlockDepth, T / width, kBlockDepth / kDepth, width, kDepth]
#pragma once

#include "linear_formats.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kBlockDepth = 256;
constexpr int64_t kBlockTokens = 256;
constexpr int64_t kBlockRows = 96;  // a multiple of all tile_rows

// Vectors of tokens that are multiplied at a time, and the rows that go with M of them: as many as
// leave the sums, the vectors and a broadcast value in registers.
constexpr int kTileVectors = Vec::width == 16 ? 4 : Vec::width == 8 ? 2 : 1;
constexpr int tile_rows(int vectors) {
  if (Vec::width == 1) return 4;
  if (Vec::width == 8) return vectors == 1 ? 12 : 6;
  return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6;
}

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// One task's weights and sums.
template <class A>
struct ManyBuffers {
  alignas(64) float sums[kBlockRows * kBlockTokens];  // [rows, tokens]
  alignas(64) typename A::Element weights[kBlockRows * kBlockDepth];
};

// Two vectors of values, in order.
MISTRAL_SIMD void put(float* out, Vec first, Vec second) {
  store(out, first);
  store(out + Vec::width, second);
}
#if defined(__AVX512BF16__)
MISTRAL_SIMD void put(bf16* out, Vec first, Vec second) {
  store_pairs(out, to_pairs(first, second));
}
#endif

constexpr int64_t kUnpacked = 8 * Vec::width;  // values of a row at a time

// Unpacks kUnpacked values of one row from k on; those past K are 0. Those of int4 come in the
// order of Int4Chunk::k_at.
template <WeightFormat format, class T, class Element>
MISTRAL_SIMD void unpack(const WeightRows& w, int64_t row, int64_t k, Element* out) {
  constexpr int64_t kBytes = format == WeightFormat::int4   ? kUnpacked / 2
                             : format == WeightFormat::int8 ? kUnpacked
                                                            : kUnpacked * int64_t{sizeof(T)};
  if (k >= w.inputs) {
    memset(out, 0, kUnpacked * sizeof(Element));
    return;
  }
  const char* values = w.values + row * w.row_bytes + k * kBytes / kUnpacked;
  char rest[kBytes];
  if (k + kUnpacked > w.inputs) {
    const int64_t there = (w.inputs - k) * kBytes / kUnpacked;
    memcpy(rest, values, there);
    memset(rest + there, 0, kBytes - there);
    values = rest;
  }
  if constexpr (format == WeightFormat::int4) {
    const Words words = load_words(values);
    const Vec scales = w.load_scales(GroupScales(w.group_log2), row, k, kUnpacked);
    for (int i = 0; i < 8; i += 2) {
      put(out + i * Vec::width, int4_value(words, i) * scales, int4_value(words, i + 1) * scales);
    }
  } else if constexpr (format == WeightFormat::int8) {
    const int8_t* x = reinterpret_cast<const int8_t*>(values);
    const Vec scale = broadcast(to_float(w.scales[row]));
    for (int i = 0; i < 8 * Vec::width; i += 2 * Vec::width) {
      put(out + i, load(x + i) * scale, load(x + i + Vec::width) * scale);
    }
  } else if constexpr (sizeof(T) == sizeof(Element)) {
    memcpy(out, values, kBytes);
  } else {
    const T* x = reinterpret_cast<const T*>(values);
    for (int i = 0; i < 8 * Vec::width; i += 2 * Vec::width) {
      put(out + i, load(x + i), load(x + i + Vec::width));
    }
  }
}

// sums [R, M vectors] = (or, if not the first block of k, +=) products over `depth` values, which
// are summed on their own: one running sum over thousands of values would lose digits.
template <class A, int R, int M>
void multiply_tile(const typename A::Element* weights, const typename A::Element* x,
                   int64_t stride_x, int64_t depth, bool first, float* sums) {
  Vec tile[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) tile[r][m] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < depth; k += A::kDepth) {
    typename A::Operand tokens[M];
    for (int m = 0; m < M; ++m) tokens[m] = A::load(x + m * stride_x + k * Vec::width);
    for (int r = 0; r < R; ++r) {
      const auto weight = A::splat(weights + r * kBlockDepth + k);
      for (int m = 0; m < M; ++m) tile[r][m] = A::multiply_add(weight, tokens[m], tile[r][m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float* sum = sums + r * kBlockTokens + m * Vec::width;
      store(sum, first ? tile[r][m] : load(sum) + tile[r][m]);
    }
  }
}

template <class A, int M>
void multiply_vectors(const typename A::Element* weights, int64_t rows,
                      const typename A::Element* x, int64_t stride_x, int64_t depth, bool first,
                      float* sums) {
  constexpr int R = tile_rows(M);
  for (int64_t row = 0; row < rows; row += R) {
    multiply_tile<A, R, M>(weights + row * kBlockDepth, x, stride_x, depth, first,
                           sums + row * kBlockTokens);
  }
}

// buffers.sums [rows, tokens] = the products of up to kBlockRows rows, which `unpack_row(row, k,
// out)` provides, and up to kBlockTokens tokens, from vector `first_vector` of the packed x on.
template <class A, class UnpackRow>
void multiply_many(const UnpackRow& unpack_row, int64_t rows, int64_t inputs,
                   const typename A::Element* x, int64_t all_vectors, int64_t first_vector,
                   int64_t vectors, ManyBuffers<A>& buffers) {
  const int64_t padded_inputs = padded(inputs);
  // The last tile of rows may go beyond them.
  memset(buffers.weights + rows * kBlockDepth, 0,
         (kBlockRows - rows) * kBlockDepth * sizeof(typename A::Element));
  for (int64_t begin = 0; begin < padded_inputs; begin += kBlockDepth) {
    const int64_t depth = mistral::min(kBlockDepth, padded_inputs - begin);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < depth; k += kUnpacked) {
        unpack_row(row, begin + k, buffers.weights + row * kBlockDepth + k);
      }
    }
    const int64_t stride_x = depth * Vec::width;
    const auto* block = x + begin * all_vectors * Vec::width + first_vector * stride_x;
    for (int64_t vector = 0; vector < vectors; vector += kTileVectors) {
      const auto* from = block + vector * stride_x;
      float* sums = buffers.sums + vector * Vec::width;
      const bool first = begin == 0;
      const auto multiply = [&](auto m) {
        multiply_vectors<A, m.value>(buffers.weights, rows, from, stride_x, depth, first, sums);
      };
      switch (mistral::min(kTileVectors, vectors - vector)) {
        case 4: multiply(Constant<mistral::min(4, kTileVectors)>{}); break;
        case 3: multiply(Constant<mistral::min(3, kTileVectors)>{}); break;
        case 2: multiply(Constant<mistral::min(2, kTileVectors)>{}); break;
        default: multiply(Constant<1>{});
      }
    }
  }
}

}  // namespace mistral::cpu::MISTRAL_ISA

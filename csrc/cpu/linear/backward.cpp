// d_x = d_out W with the tiles of gemm.h. The sum runs over the rows of W, so a block of W is
// transposed as it is unpacked: its columns take the place of rows of weights, and d_out that of
// the activations.
#include "../../linear.h"

#include <type_traits>

#include "../kernels.h"
#include "../parallel.h"
#include "activations.h"
#include "gemm.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kColumns = 128;  // inputs of a task: whole runs of kUnpacked values
static_assert(kColumns % kUnpacked == 0, "");

// Tokens whose d_out is packed at a time, so that scratch memory does not grow with T.
template <class Tile>
constexpr int64_t kPackedTokens = 2 * Tile::kBlockTokens;

template <class Tile>
struct BackwardBuffers {
  static constexpr int64_t kRows = kColumns + 32;  // the last tile may reach past the columns
  static_assert(kRows <= Tile::kTaskRows, "");

  alignas(64) float sums[Tile::kBlockTokens * Tile::kTaskRows];           // as in ManyBuffers
  alignas(64) typename Tile::Element weights[kRows * Tile::kBlockDepth];  // [columns, rows of W]
};

// Transposes kUnpacked values of Vec::width rows, whose values begin kUnpacked elements apart.
// Value i of a row goes to line Order::k_at(i) of `out`.
template <class Order, class Element>
void transpose_into(const Element* rows, Element* out, int64_t stride_out) {
  if constexpr (std::is_same_v<Element, float>) {
    for (int64_t k = 0; k < kUnpacked; k += Vec::width) {
      Vec square[Vec::width];
      for (int64_t i = 0; i < Vec::width; ++i) square[i] = load(rows + i * kUnpacked + k);
      transpose(square);
      for (int64_t i = 0; i < Vec::width; ++i) {
        store(out + Order::k_at(k + i) * stride_out, square[i]);
      }
    }
  } else {
    for (int64_t k = 0; k < kUnpacked; ++k) {
      Element* line = out + Order::k_at(k) * stride_out;
      for (int64_t i = 0; i < Vec::width; ++i) line[i] = rows[i * kUnpacked + k];
    }
  }
}

// Unpacks `depth` rows of a part from `begin` on, kColumns values of each from `column` on. Rows
// past the last are zeros.
template <WeightFormat format, class T, class Tile>
void unpack_transposed(const WeightPart& part, int64_t inputs, int64_t begin, int64_t depth,
                       int64_t column, typename Tile::Element* out) {
  using Element = typename Tile::Element;
  using Order = typename ChunkOf<format, float>::type;
  const WeightRows all = rows_of<T>(part, inputs, 0);
  for (int64_t row = 0; row < depth; row += Vec::width) {
    for (int64_t k = 0; k < kColumns; k += kUnpacked) {
      alignas(64) Element rows[Vec::width * kUnpacked];
      for (int64_t i = 0; i < Vec::width; ++i) {
        Element* to = rows + i * kUnpacked;
        if (begin + row + i < part.rows) {
          unpack<format, T>(all.from(begin + row + i), column + k, to);
        } else {
          memset(to, 0, kUnpacked * sizeof(Element));
        }
      }
      transpose_into<Order>(rows, out + k * Tile::kBlockDepth + row, Tile::kBlockDepth);
    }
  }
}

// Packs the columns of one part of d_out, for one vector of tokens, as pack_vector does.
template <class T, class Tile>
void pack_part(const T* d_out, int64_t stride, int64_t tokens, int64_t outputs, int64_t vectors,
               int64_t vector, typename Tile::Element* packed) {
  using Order = typename ChunkOf<WeightFormat::plain, float>::type;
  const int64_t all = padded(outputs);
  for (int64_t begin = 0; begin < all; begin += Tile::kBlockDepth) {
    const int64_t depth = mistral::min(Tile::kBlockDepth, all - begin);
    alignas(64) typename Tile::Element rows[Vec::width * Tile::kBlockDepth] = {};
    for (int64_t i = 0; i < mistral::min(Vec::width, tokens - vector * Vec::width); ++i) {
      pack_row<Order>(d_out + (vector * Vec::width + i) * stride + begin,
                      mistral::min(depth, outputs - begin), rows + i * depth);
    }
    pack_vector<Tile>(rows, depth, 1, 0,
                      packed + begin * vectors * Vec::width + vector * depth * Vec::width);
  }
}

template <class Element>
int64_t packed_bytes(int64_t vectors, int64_t outputs) {
  return vectors * Vec::width * padded(outputs) * int64_t{sizeof(Element)};
}

template <class T>
class LinearBackward {
  using Tile = typename TileOf<T>::type;
  using Element = typename Tile::Element;

 public:
  explicit LinearBackward(const LinearBackwardParams& p)
      : p_(p), vectors_(ceil_div(mistral::min(p.tokens, kPackedTokens<Tile>), Vec::width)) {}

  int64_t scratch_bytes() const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < p_.num_parts; ++i) bytes += part_bytes(i);
    return bytes;
  }

  void run(int threads) {
    for (int64_t first = 0; first < p_.tokens; first += kPackedTokens<Tile>) {
      const int64_t tokens = mistral::min(kPackedTokens<Tile>, p_.tokens - first);
      pack(first, tokens, threads);
      const int64_t token_blocks = ceil_div(tokens, Tile::kBlockTokens);
      parallel_for(threads, ceil_div(p_.inputs, kColumns) * token_blocks, [&](int64_t task) {
        const int64_t begin = task % token_blocks * Tile::kBlockTokens;
        multiply(first, begin, mistral::min(Tile::kBlockTokens, tokens - begin),
                 task / token_blocks * kColumns);
      });
    }
  }

 private:
  int64_t part_bytes(int64_t part) const {
    return packed_bytes<Element>(vectors_, p_.parts[part].rows);
  }

  Element* packed(int64_t part) const {
    char* next = static_cast<char*>(p_.scratch);
    for (int64_t i = 0; i < part; ++i) next += part_bytes(i);
    return reinterpret_cast<Element*>(next);
  }

  void pack(int64_t first_token, int64_t tokens, int threads) const {
    parallel_for(threads, ceil_div(tokens, Vec::width), [&](int64_t vector) {
      const T* d_out = static_cast<const T*>(p_.d_out) + first_token * p_.stride_d_out_token;
      for (int64_t i = 0; i < p_.num_parts; d_out += p_.parts[i++].rows) {
        pack_part<T, Tile>(d_out, p_.stride_d_out_token, tokens, p_.parts[i].rows, vectors_, vector,
                           packed(i));
      }
    });
  }

  // Computes kColumns columns of d_x, for a block of the packed tokens.
  void multiply(int64_t first_token, int64_t begin_token, int64_t tokens, int64_t column) const {
    [[maybe_unused]] typename Tile::Setup setup;
    BackwardBuffers<Tile> buffers;
    memset(buffers.weights + kColumns * Tile::kBlockDepth, 0,
           (buffers.kRows - kColumns) * Tile::kBlockDepth * sizeof(Element));
    bool first = true;
    for (int64_t i = 0; i < p_.num_parts; ++i) {
      const WeightPart& part = p_.parts[i];
      const int64_t outputs = padded(part.rows);
      for (int64_t begin = 0; begin < outputs; begin += Tile::kBlockDepth, first = false) {
        const int64_t depth = mistral::min(Tile::kBlockDepth, outputs - begin);
        with_format(part.format, [&](auto format) {
          unpack_transposed<format.value, T, Tile>(part, p_.inputs, begin, depth, column,
                                                   buffers.weights);
        });
        const Element* x = packed(i) + begin * vectors_ * Vec::width + begin_token * depth;
        multiply_block(x, ceil_div(tokens, Vec::width), depth, first, buffers);
      }
    }
    if (first) memset(buffers.sums, 0, sizeof buffers.sums);  // there are no outputs
    write(buffers.sums, first_token + begin_token, tokens, column);
  }

  static void multiply_block(const Element* x, int64_t vectors, int64_t depth, bool first,
                             BackwardBuffers<Tile>& buffers) {
    const int64_t stride_x = depth * Vec::width;
    const auto fetch_nothing = [](int64_t, int64_t) {};
    for (int64_t vector = 0; vector < vectors; vector += Tile::kVectors) {
      const Element* from = x + vector * stride_x;
      float* sums = buffers.sums + vector * Tile::kTaskRows * Vec::width;
      if (vector + Tile::kVectors <= vectors) {
        multiply_vectors<Tile, Tile::kVectors>(buffers.weights, kColumns, from, stride_x, depth,
                                               first, sums, fetch_nothing);
      } else {
        multiply_vectors<Tile, 1>(buffers.weights, kColumns, from, stride_x, depth, first, sums,
                                  fetch_nothing);
      }
    }
  }

  // Transposes the sums [tokens / width, columns, width] into rows of d_x.
  void write(const float* sums, int64_t first_token, int64_t tokens, int64_t column) const {
    const int64_t count = mistral::min(kColumns, p_.inputs - column);
    for (int64_t token = 0; token < tokens; ++token) {
      const float* from =
          sums + token / Vec::width * Tile::kTaskRows * Vec::width + token % Vec::width;
      float row[kColumns];
      for (int64_t i = 0; i < count; ++i) row[i] = from[i * Vec::width];
      T* out = static_cast<T*>(p_.d_x) + (first_token + token) * p_.stride_d_x_token + column;
      int64_t i = 0;
      for (; i + Vec::width <= count; i += Vec::width) store(out + i, load(row + i));
      if (i < count) store_first(out + i, load_first(row + i, count - i), count - i);
    }
  }

  const LinearBackwardParams& p_;
  int64_t vectors_;  // of tokens, in the packed d_out
};

}  // namespace

int64_t linear_backward_scratch_bytes(const LinearBackwardParams& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype,
             [&](auto type) { bytes = LinearBackward<decltype(type)>(p).scratch_bytes(); });
  return bytes;
}

void linear_backward(const LinearBackwardParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) { LinearBackward<decltype(type)>(p).run(threads); });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// The gradient of `linear` for its input, d_x = d_out W. It uses the tiles of gemm.h, but weights
// and tokens change places. The lanes of a vector are columns of W, where gemm.h has tokens. The
// values that are broadcast to all lanes are those of d_out, where gemm.h has weights. Neighbouring
// columns are neighbours in a row of W already, so W is packed without a transpose.
#include "../../linear.h"

#include "../kernels.h"
#include "../parallel.h"
#include "activations.h"
#include "gemm.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The tile class for T. A task has kColumns columns of W, a multiple of kUnpacked.
template <class T>
struct BackwardTileOf {
  using type = typename TileOf<T>::type;
  static constexpr int64_t kColumns = 128;
};
#if defined(__AMX_BF16__)
// AMX multiplies so fast that the time to unpack weights counts. So a task has many tokens, 576,
// which share each unpacked block of W. The sums (576 KB) and the packed block of W (64 KB) stay in
// L2.
template <>
struct BackwardTileOf<bf16> {
  using type = AmxTileOf<6>;
  static constexpr int64_t kColumns = 256;
};
#endif

template <class T>
class LinearBackward {
  using Tile = typename BackwardTileOf<T>::type;
  using Element = typename Tile::Element;
  using A = typename ArithmeticOf<T>::type;
  static constexpr int64_t kColumns = BackwardTileOf<T>::kColumns;
  static constexpr int64_t kTaskTokens = Tile::kTaskRows;
  // The most tokens that are packed at a time. So scratch memory has a limit, however many tokens a
  // call has.
  static constexpr int64_t kPackedTokens = 2 * kTaskTokens;
  // The number of tokens of a tile. The packed d_out is padded with zeros to whole tiles.
  static constexpr int64_t kTileTokens =
      mistral::max(Tile::rows(1), Tile::rows(static_cast<int>(Tile::kVectors)));
  static_assert(kTaskTokens % kTileTokens == 0 && kColumns % kUnpacked == 0, "");
  static_assert(kUnpacked / Vec::width % Tile::kVectors == 0, "");

  struct Buffers {
    alignas(64) float sums[kColumns * kTaskTokens];             // [columns / width, tokens, width]
    alignas(64) Element weights[kColumns * Tile::kBlockDepth];  // in the layout of x in gemm.h
  };

 public:
  explicit LinearBackward(const LinearBackwardParams& p) : p_(p) {
    for (int64_t i = 0; i < p.num_parts; ++i) {
      with_format(p.parts[i].format, [&](auto format) { in_words_ |= !in_order(format); });
    }
  }

  int64_t scratch_bytes() const {
    return packed_tokens() * packed_outputs(p_.num_parts) * int64_t{sizeof(Element)};
  }

  void run(int threads) {
    const int64_t share = packed_tokens();
    for (int64_t first = 0; first < p_.tokens; first += share) {
      const int64_t tokens = mistral::min(share, p_.tokens - first);
      pack(first, tokens, threads);
      const int64_t blocks = ceil_div(tokens, kTaskTokens);
      const int64_t of_block = up_to_tiles(ceil_div(tokens, blocks));
      parallel_for(threads, ceil_div(p_.inputs, kColumns) * blocks, [&](int64_t task) {
        const int64_t begin = task % blocks * of_block;
        multiply(first, begin, mistral::min(of_block, tokens - begin), task / blocks * kColumns);
      });
    }
  }

 private:
  static int64_t up_to_tiles(int64_t tokens) { return ceil_div(tokens, kTileTokens) * kTileTokens; }

  template <class Format>
  static constexpr bool in_order(Format) {
    return kUnpacksInOrder<Format::value>;
  }

  // The number of tokens that are packed at a time: an equal share of all tokens, rounded up to
  // whole tiles.
  int64_t packed_tokens() const {
    return up_to_tiles(
        ceil_div(p_.tokens, mistral::max(int64_t{1}, ceil_div(p_.tokens, kPackedTokens))));
  }

  // The number of outputs (rows of W) of the parts before `part`, with each part padded to whole
  // blocks.
  int64_t packed_outputs(int64_t part) const {
    int64_t outputs = 0;
    for (int64_t i = 0; i < part; ++i) {
      outputs += ceil_div(p_.parts[i].rows, Tile::kBlockDepth) * Tile::kBlockDepth;
    }
    return outputs;
  }

  // The address of the packed d_out of a part, from output `begin` on. The layout is [outputs /
  // kBlockDepth, tokens, kBlockDepth], so the tokens of a block lie close together. With whole rows
  // of d_out between them, they could compete for the same lines of the L1 cache.
  Element* packed(int64_t part, int64_t begin) const {
    return static_cast<Element*>(p_.scratch) + (packed_outputs(part) + begin) * packed_tokens();
  }

  // Packs d_out for `tokens` tokens from first_token on.
  void pack(int64_t first_token, int64_t tokens, int threads) const {
    using Order = typename ChunkOf<WeightFormat::plain, float>::type;
    parallel_for(threads, ceil_div(up_to_tiles(tokens), kTileTokens), [&](int64_t tile) {
      const T* d_out = static_cast<const T*>(p_.d_out) + first_token * p_.stride_d_out_token;
      for (int64_t i = 0; i < p_.num_parts; d_out += p_.parts[i++].rows) {
        for (int64_t begin = 0; begin < p_.parts[i].rows; begin += Tile::kBlockDepth) {
          const int64_t count = mistral::min(Tile::kBlockDepth, p_.parts[i].rows - begin);
          for (int64_t t = tile * kTileTokens; t < (tile + 1) * kTileTokens; ++t) {
            Element* to = packed(i, begin) + t * Tile::kBlockDepth;
            if (t < tokens) {
              pack_row<Order>(d_out + t * p_.stride_d_out_token + begin, count, to);
            } else {
              memset(to, 0, padded(count) * sizeof(Element));
            }
          }
        }
      }
    });
  }

  // Computes kColumns columns of d_x, from `column` on, for `tokens` tokens. The packed tokens
  // begin at token first_token of the call, and these tokens at packed token begin_token.
  void multiply(int64_t first_token, int64_t begin_token, int64_t tokens, int64_t column) const {
    [[maybe_unused]] typename Tile::Setup setup;
    Buffers buffers;
    const int64_t columns =
        mistral::min(kColumns, ceil_div(p_.inputs - column, kUnpacked) * kUnpacked);
    bool first = true;
    for (int64_t i = 0; i < p_.num_parts; ++i) {
      const WeightPart& part = p_.parts[i];
      const int64_t outputs = padded(part.rows);
      for (int64_t begin = 0; begin < outputs; begin += Tile::kBlockDepth, first = false) {
        const int64_t depth = mistral::min(Tile::kBlockDepth, outputs - begin);
        with_format(part.format, [&](auto format) {
          unpack_block<format.value>(part, begin, depth, column, columns, buffers.weights);
        });
        multiply_block(packed(i, begin) + begin_token * Tile::kBlockDepth, tokens,
                       Fetch(part, p_.inputs, begin + depth, column, columns), columns, depth,
                       first, buffers);
      }
    }
    if (first) memset(buffers.sums, 0, sizeof buffers.sums);  // there are no outputs
    write(buffers.sums, first_token + begin_token, tokens, column);
  }

  // Unpacks and packs a block of a part: rows [begin, begin + depth) and columns [column, column +
  // columns). Rows past the end of the part become zeros.
  template <WeightFormat format>
  void unpack_block(const WeightPart& part, int64_t begin, int64_t depth, int64_t column,
                    int64_t columns, Element* out) const {
    const WeightRows all = rows_of<T>(part, p_.inputs, 0);
    for (int64_t row = 0; row < depth; row += A::kDepth) {
      for (int64_t k = 0; k < columns; k += kUnpacked) {
        alignas(64) Element values[A::kDepth][kUnpacked];
        for (int64_t i = 0; i < A::kDepth; ++i) {
          if (begin + row + i < part.rows) {
            unpack<format, T>(all.from(begin + row + i), column + k, values[i]);
            if (in_words_ && in_order(FormatConstant<format>{})) to_order_of_words(values[i]);
          } else {
            memset(values[i], 0, sizeof values[i]);
          }
        }
        for (int64_t i = 0; i < kUnpacked; i += kStep<A>) {
          const Element* rows[A::kDepth];
          for (int64_t n = 0; n < A::kDepth; ++n) rows[n] = values[n] + i;
          typename A::Operand vectors[A::kDepth];
          A::load_columns(rows, vectors);
          for (int64_t n = 0; n < A::kDepth; ++n) {
            A::store(out + (k + i + n * Vec::width) * depth + row * Vec::width, vectors[n]);
          }
        }
      }
    }
  }

  // Formats that consist of words are unpacked in an order of their own (UnpackedWords::k_at), the
  // order of words. If a part has such a format, the columns of the sums are in this order. Then
  // this function puts the values of all other parts into the same order.
  static void to_order_of_words(Element* values) {
    Element in_order[kUnpacked];
    memcpy(in_order, values, sizeof in_order);
    for (int64_t i = 0; i < kUnpacked; ++i) values[i] = in_order[UnpackedWords::k_at(i)];
  }

  // Prefetches the values of the next block, a few rows at a time. Rows are far apart, so the
  // hardware does not prefetch them.
  class Fetch {
   public:
    Fetch(const WeightPart& part, int64_t inputs, int64_t begin, int64_t column, int64_t columns)
        : rows_(rows_of<T>(part, inputs, begin)),
          left_(mistral::min(Tile::kBlockDepth, part.rows - begin)),
          first_byte_(rows_.bytes(column)),
          end_byte_(rows_.bytes(mistral::min(column + columns, inputs))) {}

    void operator()(int64_t rows) {
      for (; rows > 0 && left_ > 0; --rows, --left_) {
        for (int64_t byte = first_byte_; byte < end_byte_; byte += 64) {
          __builtin_prefetch(rows_.values + byte, 0, 2);  // into the L2 cache
        }
        rows_.values += rows_.row_bytes;
      }
    }

   private:
    WeightRows rows_;
    int64_t left_, first_byte_, end_byte_;
  };

  static void multiply_block(const Element* d_out, int64_t tokens, Fetch fetch, int64_t columns,
                             int64_t depth, bool first, Buffers& buffers) {
    const int64_t stride = depth * Vec::width;
    const int64_t steps =
        ceil_div(tokens, Tile::kBlockRows) * columns / Vec::width / Tile::kVectors;
    const int64_t rows_of_step = ceil_div(Tile::kBlockDepth, steps);
    for (int64_t token = 0; token < tokens; token += Tile::kBlockRows) {
      const int64_t count = mistral::min(Tile::kBlockRows, tokens - token);
      for (int64_t vector = 0; vector < columns / Vec::width; vector += Tile::kVectors) {
        fetch(rows_of_step);
        multiply_vectors<Tile, static_cast<int>(Tile::kVectors)>(
            d_out + token * Tile::kBlockDepth, count, buffers.weights + vector * stride, stride,
            depth, first, buffers.sums + (vector * kTaskTokens + token) * Vec::width,
            [](int64_t, int64_t) {});
      }
    }
  }

  // Writes the sums to rows of d_x.
  void write(const float* sums, int64_t first_token, int64_t tokens, int64_t column) const {
    const int64_t count = mistral::min(kColumns, p_.inputs - column);
    for (int64_t token = 0; token < tokens; ++token) {
      alignas(64) float row[kColumns];
      for (int64_t i = 0; i < count; i += Vec::width) {
        store(row + i, load(sums + i * kTaskTokens + token * Vec::width));
      }
      if (in_words_) to_natural_order(row, count, sums + token * Vec::width);
      T* out = static_cast<T*>(p_.d_x) + (first_token + token) * p_.stride_d_x_token + column;
      int64_t i = 0;
      for (; i + Vec::width <= count; i += Vec::width) store(out + i, load(row + i));
      if (i < count) store_first(out + i, load_first(row + i, count - i), count - i);
    }
  }

  // Puts the sums of a row from the order of words into the order of memory. Reads them from
  // `sums`, because `row` holds too few: only the first `count` in the order of words. Some sums of
  // the first `count` columns may come later in that order.
  static void to_natural_order(float* row, int64_t count, const float* sums) {
    for (int64_t k = 0; k < count; k += kUnpacked) {
      for (int64_t i = 0; i < 8; ++i) {
        const float* from = sums + (k + i * Vec::width) * kTaskTokens;
        for (int64_t lane = 0; lane < Vec::width; ++lane) row[k + lane * 8 + i] = from[lane];
      }
    }
  }

  const LinearBackwardParams& p_;
  bool in_words_ = false;  // the columns of the sums are in the order of words
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

// First each token's activations are packed: normalised if asked to, converted to what they are
// multiplied as, in the order of k that the weights' format has. Then each thread multiplies blocks
// of rows of the weights, with up to kFewTokens tokens (gemv.h, gemv_int8.h) or more
// (gemm.h), and writes the outputs.
#include "../../linear.h"

#include "../kernels.h"
#include "../norm.h"
#include "../parallel.h"
#include "gemm.h"
#include "gemv_int8.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The least that a thread takes of few tokens' weights at a time (with SwiGLU twice that): more
// than what it begins to fetch too late.
constexpr int64_t kLeastBytes = 1 << 16;
constexpr int64_t kMostRows = 512;  // whose outputs are written together

// Rows that are multiplied before their outputs are written, of one part; with SwiGLU of gate and
// up alike.
struct RowBlock {
  int64_t part;
  int64_t first;
  int64_t count;
  int64_t column;  // of the output
};

// Parts that have columns of their own in the output.
int64_t output_parts(const LinearParams& p) {
  return p.epilogue == Epilogue::swiglu ? 1 : p.num_parts;
}

int64_t count_blocks(const LinearParams& p, int64_t rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < output_parts(p); ++i) count += ceil_div(p.parts[i].rows, rows);
  return count;
}

// Rows from `row` of all parts on, at most `most`.
RowBlock block_from(const LinearParams& p, int64_t row, int64_t most) {
  int64_t part = 0, first = row;
  while (first >= p.parts[part].rows) first -= p.parts[part++].rows;
  return {part, first, mistral::min(most, p.parts[part].rows - first), row};
}

RowBlock block_at(const LinearParams& p, int64_t rows, int64_t index) {
  int64_t row = 0;
  for (int64_t part = 0; index >= ceil_div(p.parts[part].rows, rows); ++part) {
    index -= ceil_div(p.parts[part].rows, rows);
    row += p.parts[part].rows;
  }
  return block_from(p, row + index * rows, rows);
}

template <WeightFormat format, class T>
WeightRows rows_of(const LinearParams& p, int64_t part, int64_t first) {
  WeightRows w{};
  w.values = static_cast<const char*>(p.parts[part].values);
  w.scales = p.parts[part].scales;
  w.inputs = p.inputs;
  w.row_bytes = p.inputs * int64_t{sizeof(T)};
  if (format != WeightFormat::plain) {
    w.row_bytes = format == WeightFormat::int8 ? p.inputs : p.inputs / 2;
    w.row_scales = p.inputs / p.group;
  }
  if (format == WeightFormat::int4) w.group_log2 = __builtin_ctzll(p.group);
  return w.from(first);
}

// Writes `count` outputs of one token, which begin at `column`. `up`: for SwiGLU.
template <class T>
void finish(const LinearParams& p, int64_t token, int64_t column, const float* product,
            const float* up, int64_t count) {
  T* out = static_cast<T*>(p.out) + token * p.stride_out_token + column;
  const auto finish_vector = [&](auto load_at, auto store_at, int64_t i) {
    Vec y = load_at(product + i);
    if (p.epilogue == Epilogue::swiglu) y = silu(y) * load_at(up + i);
    if (p.epilogue == Epilogue::add) y = y + load_at(out + i);
    store_at(out + i, y);
  };
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) {
    finish_vector([](const auto* x) { return load(x); }, [](T* x, Vec y) { store(x, y); }, i);
  }
  if (i < count) {
    finish_vector([&](const auto* x) { return load_first(x, count - i); },
                  [&](T* x, Vec y) { store_first(x, y, count - i); }, i);
  }
}

// One token's activations, normalised if they are to be.
template <class T>
const T* input_row(const LinearParams& p, int64_t token, T* normalised) {
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  if (!p.norm) return x;
  normalise<T>(x, nullptr, static_cast<const T*>(p.norm), normalised, p.inputs, p.eps);
  return normalised;
}

// Packs the activations of a token, K of them, in Order's order of k and padded with zeros.
template <class Order, class T, class Element>
void pack_row(const T* x, int64_t inputs, Element* out) {
  for (int64_t begin = 0; begin < inputs; begin += kPadding) {
    const int64_t count = mistral::min(kPadding, inputs - begin);
    Element natural[kPadding] = {};
    Element* to = Order::kGrouped || count < kPadding ? natural : out + begin;
    if constexpr (sizeof(T) == sizeof(Element)) {
      memcpy(to, x + begin, count * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + Vec::width <= count; i += Vec::width) store(to + i, load(x + begin + i));
      if (i < count) store_first(to + i, load_first(x + begin + i, count - i), count - i);
    }
    if (Order::kGrouped) {
      for (int64_t i = 0; i < kPadding; ++i) out[begin + i] = natural[Order::k_at(i)];
    } else if (count < kPadding) {
      memcpy(out + begin, natural, sizeof natural);
    }
  }
}

// Packed rows [width, padded K] of one vector of tokens to the layout of gemm.h.
template <class Tile>
void pack_vector(const typename Tile::Element* rows, int64_t inputs, int64_t vectors,
                 int64_t vector, typename Tile::Element* out) {
  // An element, or a pair of them, has 4 bytes and moves as a whole.
  constexpr int64_t kUnits = 8;
  static_assert(sizeof(typename Tile::Element) * Tile::kDepth == sizeof(uint32_t), "");
  const int64_t all = padded(inputs);
  for (int64_t begin = 0; begin < all; begin += Tile::kBlockDepth) {
    const int64_t depth = mistral::min(Tile::kBlockDepth, all - begin);
    auto* block = out + begin * vectors * Vec::width + vector * depth * Vec::width;
    for (int64_t k = 0; k < depth; k += kUnits * Tile::kDepth) {
      uint32_t units[Vec::width][kUnits];
      for (int64_t lane = 0; lane < Vec::width; ++lane) {
        memcpy(units[lane], rows + lane * all + begin + k, sizeof units[lane]);
      }
      for (int64_t unit = 0; unit < kUnits; ++unit) {
        uint32_t lanes[Vec::width];
        for (int64_t lane = 0; lane < Vec::width; ++lane) lanes[lane] = units[lane][unit];
        memcpy(block + (k + unit * Tile::kDepth) * Vec::width, lanes, sizeof lanes);
      }
    }
  }
}

// The parts of the scratch memory.
template <class T, class Element>
struct Scratch {
  T* normalised;    // [T, K]
  Element* rows;    // [T, row], of many tokens up to a whole number of vectors
  Element* packed;  // the same again, of many tokens
  int64_t bytes;

  // `row`: elements of a packed row
  Scratch(const LinearParams& p, int64_t row) {
    char* next = static_cast<char*>(p.scratch);
    const auto take = [&](int64_t size) {
      char* begin = next;
      next += ceil_div(size, 64) * 64;
      return begin;
    };
    const bool many = p.tokens > kFewTokens;
    const int64_t tokens = many ? ceil_div(p.tokens, Vec::width) * Vec::width : p.tokens;
    const int64_t size = tokens * row * int64_t{sizeof(Element)};
    normalised = reinterpret_cast<T*>(take(p.norm ? p.tokens * p.inputs * int64_t{sizeof(T)} : 0));
    rows = reinterpret_cast<Element*>(take(size));
    packed = reinterpret_cast<Element*>(take(many ? size : 0));
    bytes = next - static_cast<char*>(p.scratch);
  }
};

template <WeightFormat format, class T>
Scratch<T, typename FewChunkOf<format, T>::type::Arithmetic::Element> scratch_of_few(
    const LinearParams& p) {
  return {p, packed_elements<typename FewChunkOf<format, T>::type>(p.inputs)};
}

template <class T>
Scratch<T, typename TileOf<T>::type::Element> scratch_of_many(const LinearParams& p) {
  return {p, padded(p.inputs)};
}

template <WeightFormat format, class T>
void linear_few(const LinearParams& p, int threads) {
  using Chunk = typename FewChunkOf<format, T>::type;
  const auto scratch = scratch_of_few<format, T>(p);
  const int64_t stride_x = packed_elements<Chunk>(p.inputs);
  parallel_for(threads, p.tokens, [&](int64_t token) {
    const T* x = input_row(p, token, scratch.normalised + token * p.inputs);
    auto* const packed = scratch.rows + token * stride_x;
    if constexpr (std::is_same_v<Chunk, Int8InIntegers>) {
      pack_integers(x, p.inputs, packed);
    } else {
      pack_row<Chunk>(x, p.inputs, packed);
    }
  });

  const int64_t row_bytes = mistral::max(1, rows_of<format, T>(p, 0, 0).row_bytes);
  const int64_t least = kGroupRows * mistral::max(1, kLeastBytes / (kGroupRows * row_bytes));
  const int64_t all_rows = count_blocks(p, 1);
  parallel_ranges(threads, all_rows, kGroupRows, least, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const RowBlock block = block_from(p, begin, mistral::min(kMostRows, end - begin));
      float product[kFewTokens][kMostRows], up[kFewTokens][kMostRows];
      multiply_few<Chunk>(rows_of<format, T>(p, block.part, block.first), block.count, scratch.rows,
                          stride_x, p.tokens, product[0], kMostRows);
      if (p.epilogue == Epilogue::swiglu) {
        multiply_few<Chunk>(rows_of<format, T>(p, 1, block.first), block.count, scratch.rows,
                            stride_x, p.tokens, up[0], kMostRows);
      }
      for (int64_t token = 0; token < p.tokens; ++token) {
        finish<T>(p, token, block.column, product[token], up[token], block.count);
      }
      begin += block.count;
    }
  });
}

template <WeightFormat format, class T>
void linear_many(const LinearParams& p, int threads) {
  using Tile = typename TileOf<T>::type;
  // The order of k as `unpack` leaves it.
  using Order = typename ChunkOf<format, float>::type;
  const auto scratch = scratch_of_many<T>(p);
  const int64_t stride_x = padded(p.inputs);
  const int64_t vectors = ceil_div(p.tokens, Vec::width);
  parallel_for(threads, vectors, [&](int64_t vector) {
    const int64_t first = vector * Vec::width;
    auto* rows = scratch.rows + first * stride_x;
    const int64_t count = mistral::min(Vec::width, p.tokens - first);
    for (int64_t i = 0; i < count; ++i) {
      const T* x = input_row(p, first + i, scratch.normalised + (first + i) * p.inputs);
      pack_row<Order>(x, p.inputs, rows + i * stride_x);
    }
    memset(rows + count * stride_x, 0, (Vec::width - count) * stride_x * sizeof *rows);
    pack_vector<Tile>(rows, p.inputs, vectors, vector, scratch.packed);
  });

  const bool swiglu = p.epilogue == Epilogue::swiglu;
  const int64_t token_blocks = ceil_div(p.tokens, Tile::kBlockTokens);
  const int64_t parts = swiglu ? 2 : 1;  // whose rows go together
  // As many rows as leave enough tasks to share out.
  int64_t rows_per_task = Tile::kTaskRows / parts;
  while (rows_per_task > Tile::kBlockRows / parts &&
         count_blocks(p, rows_per_task) * token_blocks < 4 * threads) {
    rows_per_task -= Tile::kBlockRows / parts;
  }
  // Blocks of tokens come first, while the rows are in the cache.
  parallel_for(threads, count_blocks(p, rows_per_task) * token_blocks, [&](int64_t task) {
    const RowBlock block = block_at(p, rows_per_task, task / token_blocks);
    const int64_t first_token = task % token_blocks * Tile::kBlockTokens;
    const int64_t tokens = mistral::min(Tile::kBlockTokens, p.tokens - first_token);
    TaskRows rows{};
    rows.first = rows_of<format, T>(p, block.part, block.first);
    rows.first_count = rows.count = block.count;
    if (swiglu) {
      rows.second = rows_of<format, T>(p, 1, block.first);
      rows.count += block.count;
    }
    ManyBuffers<Tile> buffers;
    multiply_many<format, T>(rows, scratch.packed, vectors, first_token / Vec::width,
                             ceil_div(tokens, Vec::width), buffers);

    // From rows of tokens to rows of outputs, one vector of tokens at a time.
    for (int64_t first = 0; first < tokens; first += Vec::width) {
      float outputs[Vec::width][Tile::kTaskRows];
      const float* sums = buffers.sums + first * Tile::kTaskRows;
      for (int64_t row = 0; row < rows.count; ++row) {
        for (int64_t lane = 0; lane < Vec::width; ++lane) {
          outputs[lane][row] = sums[row * Vec::width + lane];
        }
      }
      const int64_t count = mistral::min(Vec::width, tokens - first);
      for (int64_t lane = 0; lane < count; ++lane) {
        finish<T>(p, first_token + first + lane, block.column, outputs[lane],
                  outputs[lane] + block.count, block.count);
      }
    }
  });
}

// Writes p.token_ids.
template <class T>
void find_largest(const LinearParams& p, int threads) {
  parallel_for(threads, p.tokens, [&](int64_t token) {
    const T* out = static_cast<const T*>(p.out) + token * p.stride_out_token;
    Rank best = 0;
    for (int64_t id = 0; id < p.limit; ++id) {
      best = higher(best, rank_of(key_of(to_float(out[id])), id));
    }
    p.token_ids[token] = greedy_choice(best);
  });
}

// Calls f with the format as a constant and a value of the type that stores p.dtype.
template <WeightFormat value_>
struct Format {
  static constexpr WeightFormat value = value_;
};
template <class F>
void with_format(const LinearParams& p, const F& f) {
  with_dtype(p.dtype, [&](auto type) {
    switch (p.format) {
      case WeightFormat::plain: return f(Format<WeightFormat::plain>{}, type);
      case WeightFormat::int8: return f(Format<WeightFormat::int8>{}, type);
      case WeightFormat::int4: return f(Format<WeightFormat::int4>{}, type);
    }
  });
}

}  // namespace

int64_t linear_scratch_bytes(const LinearParams& p) {
  int64_t bytes = 0;
  with_format(p, [&](auto format, auto type) {
    using T = decltype(type);
    bytes = p.tokens <= kFewTokens ? scratch_of_few<format.value, T>(p).bytes
                                   : scratch_of_many<T>(p).bytes;
  });
  return bytes;
}

void linear(const LinearParams& p, int threads) {
  with_format(p, [&](auto format, auto type) {
    using T = decltype(type);
    if (p.tokens <= kFewTokens) {
      linear_few<format.value, T>(p, threads);
    } else {
      linear_many<format.value, T>(p, threads);
    }
    if (p.epilogue == Epilogue::argmax) find_largest<T>(p, threads);
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

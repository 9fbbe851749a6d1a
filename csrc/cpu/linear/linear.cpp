// The op `linear` on the CPU. It multiplies the activations of a call by one or more weights, the
// parts of the call (linear.h), such as query, key and value, or gate and up.
//
// First the activations of each token are packed (activations.h). They are normalised if the layer
// has a norm, converted, and put in the order in which the weight format unpacks its values. Then
// each thread multiplies blocks of rows of the weights and writes the outputs. Up to kGemvTokens
// tokens are multiplied in the files gemv*.h, more tokens in gemm.h and gemm_bytes.h.
#include "../../linear.h"

#include "../highest_rank.h"
#include "../kernels.h"
#include "../parallel.h"
#include "activations.h"
#include "gemm.h"
#include "gemm_bytes.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// About the fewest bytes of weights that a thread takes at a time in gemv, or with SwiGLU, of each
// of the two parts. The prefetch comes too late for the first kAheadBytes of these bytes, so there
// must be many more.
constexpr int64_t kLeastBytes = 1 << 16;
constexpr int64_t kMostRows = 512;  // the most rows whose outputs are written together

// Neighbouring rows whose outputs are written together. They belong to one part. With SwiGLU the
// block stands for the same rows of both parts, gate and up.
struct RowBlock {
  int64_t part;
  int64_t first;
  int64_t count;
  int64_t column;  // the column of the first output
};

// The number of parts that have their own columns in the output.
int64_t output_parts(const LinearParams& p) {
  return p.epilogue == Epilogue::swiglu ? 1 : p.num_parts;
}

// The number of blocks of up to `rows` rows. Each block belongs to one part.
int64_t count_blocks(const LinearParams& p, int64_t rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < output_parts(p); ++i) count += ceil_div(p.parts[i].rows, rows);
  return count;
}

// A block of at most `most` rows of one part, which begins at row `row`. Rows are counted through
// all parts.
RowBlock block_from(const LinearParams& p, int64_t row, int64_t most) {
  int64_t part = 0, first = row;
  while (first >= p.parts[part].rows) first -= p.parts[part++].rows;
  return {part, first, mistral::min(most, p.parts[part].rows - first), row};
}

// Returns block number `index` of the blocks that count_blocks counts.
RowBlock block_at(const LinearParams& p, int64_t rows, int64_t index) {
  int64_t row = 0;
  for (int64_t part = 0; index >= ceil_div(p.parts[part].rows, rows); ++part) {
    index -= ceil_div(p.parts[part].rows, rows);
    row += p.parts[part].rows;
  }
  return block_from(p, row + index * rows, rows);
}

// Writes `count` outputs of one token, from column `column` on. `product` holds the sums of their
// rows. With SwiGLU, these are rows of the first part, and `up` holds the sums of the second part.
// Otherwise `up` is not read.
template <class T>
void finish(const LinearParams& p, int64_t token, int64_t column, const float* product,
            const float* up, int64_t count) {
  T* out = static_cast<T*>(p.out) + token * p.stride_out_token + column;
  const float* added = p.added ? p.added + token * p.stride_added_token + column : nullptr;
  const auto finish_vector = [&](auto load_at, auto store_at, int64_t i) {
    Vec y = load_at(product + i);
    if (added) y = y + load_at(added + i);
    if (p.epilogue == Epilogue::swiglu) {
      Vec factor = load_at(up + i);
      if (added) factor = factor + load_at(added + p.parts[0].rows + i);
      y = silu(y) * factor;
    }
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

// The first part that has the same packed activations as `part`.
template <class T>
int64_t first_like(const LinearParams& p, int64_t part) {
  int64_t first = 0;
  while (packing_mark<T>(p, first) != packing_mark<T>(p, part)) ++first;
  return first;
}

// The scratch memory of a call.
template <class T>
struct Scratch {
  T* normalised;            // [tokens, K]; empty if there is no norm
  char* rows;               // for gemm.h: rows of activations before pack_vector rearranges them
  char* packed[kMaxParts];  // the activations for each part; parts with the same packing share them
  int64_t bytes;

  explicit Scratch(const LinearParams& p) {
    char* next = static_cast<char*>(p.scratch);
    const auto take = [&](int64_t size) {
      char* begin = next;
      next += ceil_div(size, 64) * 64;
      return begin;
    };
    const bool many = p.tokens > kGemvTokens;
    normalised = reinterpret_cast<T*>(take(p.norm ? p.tokens * p.inputs * int64_t{sizeof(T)} : 0));
    bool vectors = false;  // whether gemm.h multiplies at least one part
    for (int64_t part = 0; part < p.num_parts; ++part) vectors |= many && !in_bytes<T>(p, part);
    rows = take(vectors ? many_bytes(p) : 0);
    for (int64_t part = 0; part < p.num_parts; ++part) {
      const int64_t like = first_like<T>(p, part);
      const bool few = !many || in_bytes<T>(p, part);
      packed[part] = like < part ? packed[like] : take(few ? few_bytes(p, part) : many_bytes(p));
    }
    bytes = next - static_cast<char*>(p.scratch);
  }

 private:
  static int64_t many_bytes(const LinearParams& p) {
    const int64_t tokens = ceil_div(p.tokens, Vec::width) * Vec::width;
    return tokens * padded(p.inputs) * int64_t{sizeof(typename TileOf<T>::type::Element)};
  }
  static int64_t few_bytes(const LinearParams& p, int64_t part) {
    return with_few_chunk<T>(p, part, [&](auto chunk) {
      using Chunk = decltype(chunk);
      // Tokens may be packed in pairs. Then the last token may need a pair of its own.
      const int64_t tokens = kPacksTogether<Chunk> ? ceil_div(p.tokens, 2) * 2 : p.tokens;
      return tokens * Packing<Chunk>::elements(p.inputs) *
             int64_t{sizeof(typename Chunk::Arithmetic::Element)};
    });
  }
};

// Packs a token for gemv, or for products in bytes.
template <class T>
void pack_token(const LinearParams& p, const Scratch<T>& scratch, int64_t part, int64_t token,
                const T* x) {
  with_few_chunk<T>(p, part, [&](auto chunk) {
    using Chunk = decltype(chunk);
    auto* packed = reinterpret_cast<typename Chunk::Arithmetic::Element*>(scratch.packed[part]);
    if constexpr (kPacksTogether<Chunk>) {
      if (p.tokens > 1) {
        return Packing<Chunk>::pack_together(x, p.inputs, token, p.tokens, packed);
      }
    }
    Packing<Chunk>::pack(x, p.inputs, packed + token * Packing<Chunk>::elements(p.inputs));
  });
}

template <class T>
void linear_few(const LinearParams& p, int threads) {
  const Scratch<T> scratch(p);
  // Calls f with a value of the chunk type of the part, the packed activations for the part, and
  // the number of packed elements of each token.
  const auto with_chunk = [&](int64_t part, const auto& f) {
    with_few_chunk<T>(p, part, [&](auto chunk) {
      using Chunk = decltype(chunk);
      f(chunk, reinterpret_cast<typename Chunk::Arithmetic::Element*>(scratch.packed[part]),
        Packing<Chunk>::elements(p.inputs));
    });
  };
  parallel_for(threads, p.tokens, [&](int64_t token) {
    const T* x = input_row(p, token, scratch.normalised + token * p.inputs);
    for (int64_t part = 0; part < p.num_parts; ++part) {
      if (first_like<T>(p, part) == part) pack_token(p, scratch, part, token, x);
    }
  });

  const int64_t row_bytes = mistral::max(1, rows_of<T>(p.parts[0], p.inputs, 0).row_bytes);
  const int64_t least = kGroupRows * mistral::max(1, kLeastBytes / (kGroupRows * row_bytes));
  const int64_t all_rows = count_blocks(p, 1);
  parallel_ranges(threads, all_rows, kGroupRows, least, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const RowBlock block = block_from(p, begin, mistral::min(kMostRows, end - begin));
      float product[kGemvTokens][kMostRows], up[kGemvTokens][kMostRows];
      const auto multiply = [&](int64_t part, float* out) {
        with_chunk(part, [&](auto chunk, const auto* packed, int64_t stride_x) {
          Few<decltype(chunk)>::multiply(rows_of<T>(p.parts[part], p.inputs, block.first),
                                         block.count, packed, stride_x, p.tokens, out, kMostRows);
        });
      };
      multiply(block.part, product[0]);
      if (p.epilogue == Epilogue::swiglu) multiply(1, up[0]);
      for (int64_t token = 0; token < p.tokens; ++token) {
        finish<T>(p, token, block.column, product[token], up[token], block.count);
      }
      begin += block.count;
    }
  });
}

// Packs the activations of a vector of tokens for a part of this format. A vector of tokens is
// Vec::width neighbouring tokens, one for each lane. The first `count` lanes have tokens, and x[i]
// are the activations of token i. The other lanes become zeros.
template <WeightFormat format, class T>
void pack_for_many(const LinearParams& p, const Scratch<T>& scratch, int64_t part, int64_t vectors,
                   int64_t vector, const T* const* x, int64_t count) {
  using Tile = typename TileOf<T>::type;
  using Element = typename Tile::Element;
  // `unpack` (unpack.h) leaves the values of a row in the order of this type's k_at.
  using Order = typename ChunkOf<format, float>::type;
  const int64_t stride_x = padded(p.inputs);
  auto* rows = reinterpret_cast<Element*>(scratch.rows) + vector * Vec::width * stride_x;
  for (int64_t i = 0; i < count; ++i) pack_row<Order>(x[i], p.inputs, rows + i * stride_x);
  memset(rows + count * stride_x, 0, (Vec::width - count) * stride_x * sizeof *rows);
  pack_vector<Tile>(rows, p.inputs, vectors, vector,
                    reinterpret_cast<Element*>(scratch.packed[part]));
}

// Packs a vector of tokens for all parts of the weights.
template <class T>
void pack_tokens(const LinearParams& p, const Scratch<T>& scratch, int64_t vectors,
                 int64_t vector) {
  const int64_t first = vector * Vec::width;
  const int64_t count = mistral::min(Vec::width, p.tokens - first);
  const T* x[Vec::width];
  for (int64_t i = 0; i < count; ++i) {
    x[i] = input_row(p, first + i, scratch.normalised + (first + i) * p.inputs);
  }
  for (int64_t part = 0; part < p.num_parts; ++part) {
    if (first_like<T>(p, part) != part) continue;
    if (in_bytes<T>(p, part)) {
      for (int64_t i = 0; i < count; ++i) pack_token(p, scratch, part, first + i, x[i]);
    } else {
      with_format(p.parts[part].format, [&](auto format) {
        pack_for_many<format.value>(p, scratch, part, vectors, vector, x, count);
      });
    }
  }
}

// Multiplies the rows of the block by `tokens` tokens, the first of which is first_token. With
// SwiGLU, multiplies the rows of both parts. Writes the products to buffers.sums.
template <class T, class Tile>
void multiply_block_rows(const LinearParams& p, const Scratch<T>& scratch, const RowBlock& block,
                         int64_t first_token, int64_t tokens, ManyBuffers<Tile>& buffers) {
  using Element = typename Tile::Element;
  const auto rows_at = [&](int64_t part) {
    return rows_of<T>(p.parts[part], p.inputs, block.first);
  };
  // Multiplies rows of a part. The sums begin at row first_row of the buffer.
  const auto multiply = [&](int64_t part, const TaskRows& rows, int64_t first_row) {
    multiply_many(rows, unpack_of<T, Element>(p.parts[part].format), first_row,
                  reinterpret_cast<const Element*>(scratch.packed[part]),
                  ceil_div(p.tokens, Vec::width), first_token / Vec::width,
                  ceil_div(tokens, Vec::width), buffers);
  };
  static_assert(Tile::kBlockTokens <= kPanelTokens || kInTiles<T>, "");
  const auto multiply_bytes = [&](int64_t part, int64_t first_row) {
    const int64_t stride_x = packed_byte_row(p.inputs);
    const ByteProducts products = {rows_at(part), block.count,
                                   scratch.packed[part] + first_token * stride_x, stride_x, tokens};
    const ProductsOut out = {buffers.sums + first_row * Vec::width, Tile::kTaskRows * Vec::width,
                             block.count};
    with_format(p.parts[part].format,
                [&](auto format) { multiply_many_bytes<format.value>(products, out); });
  };

  const bool swiglu = p.epilogue == Epilogue::swiglu;
  if (swiglu && p.parts[0].format == p.parts[1].format && !in_bytes<T>(p, 0)) {
    // Both parts are multiplied in one call, so that they share the activations in the cache.
    return multiply(0, {rows_at(0), rows_at(1), 2 * block.count, block.count}, 0);
  }
  // The parts are multiplied in the order of their rows in the sums, because multiply_many may
  // overwrite later rows of the sums.
  for (int64_t i = 0; i < (swiglu ? 2 : 1); ++i) {
    const int64_t part = block.part + i, first_row = i * block.count;
    if (in_bytes<T>(p, part)) {
      multiply_bytes(part, first_row);
    } else {
      multiply(part, {rows_at(part), {}, block.count, block.count}, first_row);
    }
  }
}

template <class T>
void linear_many(const LinearParams& p, int threads) {
  using Tile = typename TileOf<T>::type;
  const Scratch<T> scratch(p);
  const int64_t vectors = ceil_div(p.tokens, Vec::width);
  parallel_for(threads, vectors, [&](int64_t vector) { pack_tokens(p, scratch, vectors, vector); });

  const bool swiglu = p.epilogue == Epilogue::swiglu;
  const int64_t token_blocks = ceil_div(p.tokens, Tile::kBlockTokens);
  const int64_t parts = swiglu ? 2 : 1;  // the number of parts whose rows a task multiplies
  // A task has kTaskRows rows, counting both parts with SwiGLU. If this makes fewer than four tasks
  // for each thread, a task has fewer rows, but at least kBlockRows. More tasks keep all threads
  // busy to the end.
  int64_t rows_per_task = Tile::kTaskRows / parts;
  while (rows_per_task > Tile::kBlockRows / parts &&
         count_blocks(p, rows_per_task) * token_blocks < 4 * threads) {
    rows_per_task -= Tile::kBlockRows / parts;
  }
  // If gate and up differ in format, they are multiplied one after the other. The second product
  // may overwrite sums up to the end of its last tile. With at most kBlockRows rows of each part,
  // that end is still within the kTaskRows rows of the sums.
  static_assert(2 * Tile::kBlockRows <= Tile::kTaskRows, "");
  if (swiglu && p.parts[0].format != p.parts[1].format) {
    rows_per_task = mistral::min(rows_per_task, Tile::kBlockRows);
  }
  // Consecutive tasks multiply the same rows by different tokens, while these rows are in the
  // cache.
  parallel_for(threads, count_blocks(p, rows_per_task) * token_blocks, [&](int64_t task) {
    const RowBlock block = block_at(p, rows_per_task, task / token_blocks);
    const int64_t first_token = task % token_blocks * Tile::kBlockTokens;
    const int64_t tokens = mistral::min(Tile::kBlockTokens, p.tokens - first_token);
    ManyBuffers<Tile> buffers;
    multiply_block_rows(p, scratch, block, first_token, tokens, buffers);

    // Puts the sums of each part into the order of `finish`, one vector of tokens at a time: for
    // each token, all of its rows side by side. Products in bytes have this order already. The sums
    // of gemm.h have, for each row, all tokens of the vector side by side.
    for (int64_t first = 0; first < tokens; first += Vec::width) {
      float outputs[2][Vec::width * Tile::kTaskRows];
      const float* rows_of_part[2] = {buffers.sums, buffers.sums};
      for (int64_t i = 0; i < parts; ++i) {
        const float* sums = buffers.sums + first * Tile::kTaskRows + i * block.count * Vec::width;
        rows_of_part[i] = sums;
        if (in_bytes<T>(p, block.part + i)) continue;
        for (int64_t row = 0; row < block.count; ++row) {
          for (int64_t lane = 0; lane < Vec::width; ++lane) {
            outputs[i][lane * block.count + row] = sums[row * Vec::width + lane];
          }
        }
        rows_of_part[i] = outputs[i];
      }
      const int64_t there = mistral::min(Vec::width, tokens - first);
      for (int64_t lane = 0; lane < there; ++lane) {
        finish<T>(p, first_token + first + lane, block.column, rows_of_part[0] + lane * block.count,
                  rows_of_part[1] + lane * block.count, block.count);
      }
    }
  });
}

// Writes to p.token_ids the index of the largest of the first p.limit outputs of each token. Writes
// -1 if one of these outputs is NaN, or if all are -inf.
template <class T>
void find_largest(const LinearParams& p, int threads) {
  parallel_for(threads, p.tokens, [&](int64_t token) {
    const T* out = static_cast<const T*>(p.out) + token * p.stride_out_token;
    p.token_ids[token] = greedy_choice(highest_rank_of(out, p.limit));
  });
}

}  // namespace

int64_t linear_scratch_bytes(const LinearParams& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto type) { bytes = Scratch<decltype(type)>(p).bytes; });
  return bytes;
}

bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens) {
  bool rounds = false;
  with_dtype(dtype, [&](auto type) { rounds = rounds_to_bytes<decltype(type)>(format, tokens); });
  return rounds;
}

void linear(const LinearParams& p, int threads) {
  if (p.tokens == 0) return;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.tokens <= kGemvTokens) {
      linear_few<T>(p, threads);
    } else {
      linear_many<T>(p, threads);
    }
    if (p.epilogue == Epilogue::argmax) find_largest<T>(p, threads);
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

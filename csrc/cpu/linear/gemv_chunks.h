// gemv in integers. A chunk has kValues values of each of kRows rows, and is unpacked once for all
// tokens. A chunk type has these members:
//
//   take(values, scales, group_log2, k, there)   unpacks values of kRows rows from k on; each row
//                                                has `there` of them
//   add(lines, totals)                           multiplies the unpacked values by activations of N
//                                                times kTokens tokens, and adds to the totals
//   Sums, store_sums                             vectors with the totals of kRows rows and kTokens
//                                                tokens
//   kBytes                                       the number of bytes of a chunk in each row
//   kHeadBytes, kLineBytes                       the sizes of a packed token: of its head, and of
//                                                its line for each chunk
//   unit(x)                                      a factor of all products of a packed token
//   OneRow                                       a chunk type for one row with the same additions
//
// If kTokens is more than 1, that many tokens are packed together, in common lines. One token alone
// is packed in the lines of OneRow.
//
// With one token, one row is multiplied at a time, as a single stream through memory. With more
// tokens, kRows rows are multiplied together and share instructions. The result of a row does not
// depend on the rows beside it: a row gets the same bits alone and at any place.
#pragma once

#include "gemv.h"

namespace mistral::cpu::MISTRAL_ISA {

// The most tokens that are multiplied by a group of rows. gemv has up to kGemvTokens of them, and a
// product in bytes may have more (gemm_bytes.h).
constexpr int64_t kChunkTokens = 16;
static_assert(kChunkTokens >= kGemvTokens, "");

// Unpacks chunk i of the first kRows rows of `w`. Values past K become zeros. If `rows`, the number
// of rows that exist, is less than kRows, the last row is repeated.
template <class Chunk>
MISTRAL_SIMD void take_chunk(const WeightRows& w, int64_t rows, int64_t i, Chunk& chunk) {
  constexpr int R = Chunk::kRows;
  constexpr int64_t kBytes = Chunk::kBytes;
  const char *values[R], *scales[R];
  for (int r = 0; r < R; ++r) {
    const int64_t row = r == 0 ? 0 : mistral::min(int64_t{r}, rows - 1);
    values[r] = w.values + row * w.row_bytes + i * kBytes;
    scales[r] = w.scales + row * w.scale_bytes;
  }
  const int64_t there = mistral::min(Chunk::kValues, w.inputs - i * Chunk::kValues);
  char rest[R][kBytes];
  if (there < Chunk::kValues) {
    memset(rest, 0, sizeof rest);
    for (int r = 0; r < R; ++r) {
      memcpy(rest[r], values[r], w.bytes(there));
      values[r] = rest[r];
    }
  }
  chunk.take(values, scales, w.group_log2, i * Chunk::kValues, there);
}

// Adds the products of a chunk with N times kTokens tokens. Each kTokens tokens are packed
// together, and `stride_x` is the distance in bytes to the next ones.
template <int N, class Chunk>
MISTRAL_SIMD void add_chunk(const Chunk& chunk, const char* x, int64_t stride_x,
                            typename Chunk::Sums* totals) {
  const char* lines[N];
  for (int n = 0; n < N; ++n) lines[n] = x + n * stride_x;
  if constexpr (Chunk::kTokens > 1) {  // the sums are too many for registers
    chunk.add(lines, *reinterpret_cast<typename Chunk::Sums(*)[N]>(totals));
  } else {
    typename Chunk::Sums sums[N];
    for (int n = 0; n < N; ++n) sums[n] = totals[n];
    chunk.add(lines, sums);
    for (int n = 0; n < N; ++n) totals[n] = sums[n];
  }
}

// The same as add_chunk, for any number of columns. A column is kTokens tokens that are packed
// together.
template <class Chunk>
MISTRAL_SIMD void add_columns(const Chunk& chunk, const char* x, int64_t stride_x, int64_t columns,
                              typename Chunk::Sums* totals) {
  int64_t i = 0;
  if constexpr (Chunk::kTokens > 1) {
    for (; i + 4 <= columns; i += 4) add_chunk<4>(chunk, x + i * stride_x, stride_x, totals + i);
    for (; i + 2 <= columns; i += 2) add_chunk<2>(chunk, x + i * stride_x, stride_x, totals + i);
  }
  for (; i < columns; ++i) add_chunk<1>(chunk, x + i * stride_x, stride_x, totals + i);
}

template <class Chunk>
struct FewInChunks {
  // The number of rows that are multiplied by all tokens before the next rows.
  static constexpr int64_t kGroup = int64_t{kGroupRows} * Chunk::kRows;

  static void multiply(const WeightRows& w, int64_t count, const char* x, int64_t stride_x,
                       int64_t tokens, float* out, int64_t stride_out) {
    if (tokens == 1) return multiply_one<typename Chunk::OneRow>(w, count, x, out);
    for (int64_t row = 0; row < count; row += kGroup) {
      multiply_group(w.from(row), mistral::min(kGroup, count - row), x, stride_x, tokens, out + row,
                     stride_out);
    }
  }

 private:
  template <class One>
  static void multiply_one(const WeightRows& w, int64_t count, const char* x, float* out) {
    const int64_t chunks = ceil_div(w.inputs, One::kValues);
    const int64_t rows_ahead = 1 + kAheadBytes / mistral::max(1, w.row_bytes);
    for (int64_t first = 0; first < count; first += kGroupRows) {
      const WeightRows group = w.from(first);
      const int64_t rows = mistral::min(int64_t{kGroupRows}, count - first);
      typename One::Sums totals[kGroupRows] = {};
      for (int64_t row = 0; row < rows; ++row) {
        const WeightRows of_row = group.from(row);
        // The scales are prefetched row by row. If memory is slow, those of a whole group of rows
        // at once would hold up the values.
        fetch_weights(of_row.scales + rows_ahead * w.scale_bytes, w.scale_bytes);
        typename One::Sums total = {};
        for (int64_t i = 0; i < chunks; ++i) {
          fetch_weights(of_row.values + i * One::kBytes + kAheadBytes, One::kBytes);
          One chunk;
          take_chunk(of_row, 1, i, chunk);
          add_chunk<1>(chunk, x + One::kHeadBytes + i * One::kLineBytes, 0, &total);
        }
        totals[row] = total;
      }
      float sums[kGroupRows];
      One::store_sums(totals, One::unit(x), sums);
      memcpy(out + first, sums, rows * sizeof(float));
    }
  }

  // Multiplies a group of rows, one block of k after another. The activations of a block stay in
  // the L1 cache.
  static void multiply_group(const WeightRows& w, int64_t rows, const char* x, int64_t stride_x,
                             int64_t tokens, float* out, int64_t stride_out) {
    constexpr int R = Chunk::kRows;
    constexpr int64_t M = Chunk::kTokens;
    constexpr int64_t kActivationBytes = R == 1 ? 1 << 14 : 3 << 13;
    const int64_t chunks = ceil_div(w.inputs, Chunk::kValues);
    const int64_t most = mistral::max(int64_t{1}, kActivationBytes / (tokens * Chunk::kLineBytes));
    // The blocks are about equally long, because the prefetch of the next block has the length of
    // this block.
    const int64_t block = ceil_div(chunks, ceil_div(chunks, most));
    const int64_t columns = ceil_div(tokens, M), stride = M * stride_x;
    typename Chunk::Sums totals[kGroupRows][kChunkTokens / M] = {};
    for (int64_t begin = 0; begin < chunks; begin += block) {
      const int64_t end = mistral::min(begin + block, chunks);
      for (int64_t row = 0; row < rows; row += R) {
        if (begin == 0) {
          fetch<3>(w.from(row + kGroupRows * R).scales, R * w.scale_bytes);
        }
        const char* next = next_of(w, row, rows, begin, end, chunks);
        for (int64_t i = begin; i < end; ++i) {
          for (int r = 0; r < R; ++r) {
            fetch_weights(next + r * w.row_bytes + (i - begin) * Chunk::kBytes, Chunk::kBytes);
          }
          Chunk chunk;
          take_chunk(w.from(row), rows - row, i, chunk);
          const char* line = x + Chunk::kHeadBytes + i * M * Chunk::kLineBytes;
          add_columns(chunk, line, stride, columns, totals[row / R]);
        }
      }
    }
    for (int64_t column = 0; column < columns; ++column) {
      typename Chunk::Sums of_rows[kGroupRows];
      for (int i = 0; i < kGroupRows; ++i) of_rows[i] = totals[i][column];
      float sums[kGroupRows * R][M];
      Chunk::store_sums(of_rows, Chunk::unit(x + column * stride), sums[0]);
      for (int64_t token = column * M; token < mistral::min(column * M + M, tokens); ++token) {
        float* to = out + token * stride_out;
        for (int64_t row = 0; row < rows; ++row) to[row] = sums[row][token % M];
      }
    }
  }

  // The address of the values that are multiplied about kAheadBytes after chunks `begin` to `end`
  // of row `row`. The group has `rows` rows of `chunks` chunks. The values are the same chunks of a
  // later row. Past the last row they are the next block of the first rows, and past the last block
  // they are in the next group.
  static const char* next_of(const WeightRows& w, int64_t row, int64_t rows, int64_t begin,
                             int64_t end, int64_t chunks) {
    constexpr int R = Chunk::kRows;
    const int64_t block_bytes = (end - begin) * Chunk::kBytes;
    const int64_t ahead = row + ceil_div(ceil_div(kAheadBytes, block_bytes), R) * R;
    const auto from = [&](int64_t of_row, int64_t chunk) {
      return w.from(of_row).values + chunk * Chunk::kBytes;
    };
    if (ahead < rows) return from(ahead, begin);
    return end < chunks ? from(ahead - rows, end) : from(ahead, 0);
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA

// Operations on tiles that the kernels of attention share. A product of the tensor cores
// (mma_m16n8k16 in ptx.cuh) takes 16 query rows. Keys and values are in swizzled shared memory. The
// running softmax is in registers.
//
// The product of a warp is a 16 x 8 matrix. Lane l holds four of its elements, in columns 2 * (l %
// 4) and 2 * (l % 4) + 1. Elements 0 and 1 are in row l / 4, elements 2 and 3 in row l / 4 + 8. So
// the 4 lanes that share a row are neighbours.
#pragma once

#include <launch.cuh>
#include <ptx.cuh>

#include "../common/element.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "rows.cuh"

namespace mistral::cuda {

constexpr float kLog2e = 1.44269504f;

// A tile [rows, D] in shared memory. ldmatrix reads the same 16-byte chunk of 8 rows at once. The
// length of a row is a multiple of 128 bytes, so without a swizzle these 8 chunks would lie in the
// same banks. Therefore chunk c of row r is at place c ^ (r % 8).
template <class T, int D>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);  // elements of a chunk
  static constexpr int kChunks = D / kChunk;     // chunks of a row
  T* elements;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    // Only the low 3 bits of the place depend on the row. So the compiler can fold the higher bits
    // into the address.
    return elements + row * D + ((c & ~7) + ((c ^ row) & 7)) * kChunk;
  }
};

// The keys and values of one sequence and key/value head that a tile of queries sees. Their offsets
// count from the first key that the tile sees: offset o is position `begin` + o. The first
// `history` keys are in the ring. The others are new tokens, in p.k and p.v. In prefill the struct
// is in shared memory, because registers are scarce and all threads of a block use the same keys.
// The struct holds no pointers to tensors, because the params have them.
struct VisibleKeys {
  int64_t ring;   // pool row of slot 0 of the head
  int64_t token;  // the new token at offset o has index `token` + o in p.k and p.v
  int kv_head;
  int history;
  int count;       // the number of keys
  int first_slot;  // slot of offset 0
  int capacity;

  // `begin` and `end` are positions: the tile sees the keys [begin, end).
  __device__ VisibleKeys(const Sequence& s, int kv_head, int64_t begin, int64_t end)
      : ring(head_row(s, kv_head)),
        token(s.first_token + begin - s.position),
        kv_head(kv_head),
        history(static_cast<int>(max(s.position - begin, 0))),
        count(static_cast<int>(end - begin)),
        first_slot(static_cast<int>(ring_slot(s, begin))),
        capacity(static_cast<int>(s.capacity)) {}

  // The address of the key (k) or the value (v) at an offset, or null if offset >= count.
  template <class T, int D>
  __device__ __forceinline__ const T* k(const AttentionParams& p, int offset) const {
    return row<T, D>(p.k_pool, p.k, p.stride_k_token, p.stride_k_head, offset);
  }
  template <class T, int D>
  __device__ __forceinline__ const T* v(const AttentionParams& p, int offset) const {
    return row<T, D>(p.v_pool, p.v, p.stride_v_token, p.stride_v_head, offset);
  }

 private:
  template <class T, int D>
  __device__ __forceinline__ const T* row(const void* pool, const void* chunk, int64_t stride_token,
                                          int64_t stride_head, int offset) const {
    if (offset >= count) return nullptr;
    if (offset >= history) {
      return static_cast<const T*>(chunk) + (token + offset) * stride_token + kv_head * stride_head;
    }
    // At most C tokens of history are visible, so the ring wraps at most once.
    return static_cast<const T*>(pool) + (ring + wrapped_slot(first_slot + offset, capacity)) * D;
  }
};

// Starts the copy of `kRows` rows into a tile by `kThreads` threads, 16 bytes at a time. A row
// becomes zeros if row_at(row) is null.
template <int kRows, int kThreads, class Tile, class RowAt>
__device__ __forceinline__ void copy_rows(Tile tile, int thread, const RowAt& row_at) {
  constexpr int kChunks = Tile::kChunks;
  static_assert(kThreads % kChunks == 0 && kRows * kChunks % kThreads == 0);
  const int c = thread % kChunks;
#pragma unroll 2
  for (int row = thread / kChunks; row < kRows; row += kThreads / kChunks) {
    const auto* global = row_at(row);
    const bool valid = global != nullptr;
    cp_async_16(tile.chunk(row, c), valid ? global + c * Tile::kChunk : global, valid);
  }
}

// scores[m][n] = the product of rows first_row + 16 m to first_row + 16 m + 15 of q, and rows 8 n
// to 8 n + 7 of k.
template <int kM, int kN, class T, int D>
__device__ __forceinline__ void multiply_keys(float (&scores)[kM][kN][4], SharedTile<T, D> q,
                                              int first_row, SharedTile<T, D> k) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
    }
  }
  // A step multiplies 16 dimensions. With 32 query rows per warp, the registers hold the operands
  // of only 2 steps, so no more steps are unrolled.
  constexpr int kSteps = kM == 1 ? D / 16 : 2;
#pragma unroll kSteps
  for (int step = 0; step < D / 16; ++step) {  // 2 chunks of each row
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ldmatrix_x4(a[m],
                  q.chunk(first_row + 16 * m + 8 * (matrix % 2) + row, 2 * step + matrix / 2));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, k.chunk(8 * n + 8 * (matrix / 2) + row, 2 * step + matrix % 2));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(scores[m][n], a[m], b0);
        mma_m16n8k16<T>(scores[m][n + 1], a[m], b1);
      }
    }
  }
}

// out += p v. The probabilities p have the layout that Softmax::fold writes.
template <int kM, int kN, class T, int D>
__device__ __forceinline__ void multiply_values(float (&out)[kM][D / 8][4],
                                                const uint32_t (&p)[kM][kN][2],
                                                SharedTile<T, D> v) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {  // 16 keys at a time
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, v.chunk(8 * n + 8 * (matrix % 2) + row, d + matrix / 2));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t a[4] = {p[m][n][0], p[m][n][1], p[m][n + 1][0], p[m][n + 1][1]};
        mma_m16n8k16<T>(out[m][d], a, b0);
        mma_m16n8k16<T>(out[m][d + 1], a, b1);
      }
    }
  }
}

// The maximum and the sum of x over the 4 lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The running softmax of the 2 * kM rows of a lane. It computes powers of two instead of
// exponentials, so `scale` is the scale of the scores times log2(e). Index 2 m + h stands for row
// 16 m + 8 h + lane / 4 of the warp.
template <int kM>
struct Softmax {
  float scale;
  float maximum[2 * kM];  // the largest score of the row so far, unscaled
  float total[2 * kM];    // this lane's part of the row's sum of 2^(scale * (score - maximum))

  __device__ explicit Softmax(float scale) : scale(scale) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      maximum[r] = -INFINITY;
      total[r] = 0.0f;
    }
  }

  // The effect of a new maximum on row r. From now on probabilities are 2^(scale * score - base).
  // Earlier probabilities and sums must be multiplied by `factor`.
  struct Rise {
    float base, factor;
  };
  __device__ __forceinline__ Rise raise(int r, float highest) {
    // A row that has seen no key yet has the maximum -inf. Any finite base then gives 2^-inf = 0.
    const float base = highest == -INFINITY ? 0.0f : highest * scale;
    const float factor = exp2_approx(maximum[r] * scale - base);
    maximum[r] = highest;
    return {base, factor};
  }

  // 1 / (the total of row r). The results of the row must be multiplied by it.
  __device__ __forceinline__ float inverse_total(int r) const { return 1.0f / row_sum(total[r]); }

  // Raises the maximum of each row to its largest score so far. Rescales `total` and `out` to the
  // new maximum. Turns the scores into probabilities relative to it, and adds them to `total`. p
  // receives the probabilities in the layout of an operand of the next product: p[m][n] holds those
  // of elements 0 and 1 of scores[m][n] as one pair, and those of elements 2 and 3 as another pair.
  template <class T, int kN, int kD8>
  __device__ __forceinline__ void fold(const float (&scores)[kM][kN][4], uint32_t (&p)[kM][kN][2],
                                       float (&out)[kM][kD8][4]) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const int m = r / 2, i = 2 * (r % 2);
      float highest = maximum[r];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        highest = fmaxf(highest, fmaxf(scores[m][n][i], scores[m][n][i + 1]));
      }
      highest = row_max(highest);
      const auto [base, factor] = raise(r, highest);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float low = exp2_approx(scores[m][n][i] * scale - base);
        const float high = exp2_approx(scores[m][n][i + 1] * scale - base);
        sum += low + high;
        p[m][n][r % 2] = pack<T>(low, high);
      }
      total[r] = total[r] * factor + sum;
#pragma unroll
      for (int d = 0; d < kD8; ++d) {
        out[m][d][i] *= factor;
        out[m][d][i + 1] *= factor;
      }
    }
  }
};

// If a row does not see a key, sets their score to -inf. `own` has, for each of the lane's rows,
// the offset of the row's own token among the keys. `first` is the offset of the tile's first key.
template <int kM, int kN>
__device__ __forceinline__ void mask(float (&scores)[kM][kN][4], const int (&own)[2 * kM],
                                     int first, int window) {
  const int column = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = column + 8 * n + i % 2, query = own[2 * m + i / 2];
        if (is_hidden(query, key, window)) scores[m][n][i] = -INFINITY;
      }
    }
  }
}

// Stores the results of a warp: 16 * kM rows of `out`, which are the rows of the tile from `first`
// on. Row r of the lane is multiplied by factor_of(r). The results first go to the same rows of
// `tile` in shared memory, which only this warp uses. From there they can be written 16 bytes at a
// time. row_at(row) is the address where a row is stored. It is null for the first row that is not
// stored, and for all rows after it.
template <int kM, class T, int D, class FactorOf, class RowAt>
__device__ __forceinline__ void store_rows(SharedTile<T, D> tile, int first,
                                           const float (&out)[kM][D / 8][4],
                                           const FactorOf& factor_of, const RowAt& row_at) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const float factor = factor_of(r);
    const int row = first + 8 * r + lane / 4, i = 2 * (r % 2);
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const uint32_t pair = pack<T>(out[r / 2][d][i] * factor, out[r / 2][d][i + 1] * factor);
      memcpy(tile.chunk(row, d) + 2 * (lane % 4), &pair, sizeof pair);
    }
  }
  __syncwarp();
  constexpr int kChunks = SharedTile<T, D>::kChunks;
  for (int item = lane; item < 16 * kM * kChunks; item += kWarp) {
    const int row = first + item / kChunks, c = item % kChunks;
    T* global = row_at(row);
    if (global == nullptr) break;
    store16(global + c * kVec16<T>, load_shared16(tile.chunk(row, c)));
  }
}

}  // namespace mistral::cuda

// Grid: one block per row of logits. In all passes over the row, a thread owns the same groups of
// four tokens: every kThreads-th group. So without a barrier, it may read in a later pass the keys
// and weights that it wrote in an earlier pass. A group has four tokens because one call of the
// random number generator (philox.h) gives four numbers.
//
// sample.h explains the keys, ranks, filters and weights that this file uses. A key is the adjusted
// logit of a token as an integer, and a rank is a key with the id of its token.
//
// Results do not depend on the order of the threads, because all sums over threads are integers.
#include "../sample.h"

#include <launch.cuh>

#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = static_cast<int>(kTokensPerBlock);
constexpr int kDigitBits = 4;
constexpr int kBins = 1 << kDigitBits;
static_assert(kIdBits % kDigitBits == 0 && kRankBits % kDigitBits == 0);
static_assert(kBins == kWarps, "a warp adds up a bin");

struct Shared {
  // A histogram for each thread. So no atomic operations are needed, and the threads of a warp
  // access different banks.
  uint64_t bins[kBins][kThreads];
  // In `select` these are the sums of the bins, in block_reduce the results of the warps.
  uint64_t sums[kBins];
};

// ---- Groups of four tokens. If kWide, they are loaded and stored 16 bytes at a time. A key that
// is loaded past the end of a row is 0, which is below every threshold.

template <bool kWide, class T>
__device__ __forceinline__ void load_group(T (&values)[kGroup], const T* row, int first,
                                           int vocab_size) {
  if constexpr (kWide) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kVec16<T>) {
      const Vec16<T> v = load16(row + first + i);
#pragma unroll
      for (int j = 0; j < kVec16<T>; ++j) values[i + j] = v.values[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      values[i] = first + i < vocab_size ? load_global(row + first + i) : T{};
    }
  }
}

template <bool kWide, class T>
__device__ __forceinline__ void store_group(T* row, const T (&values)[kGroup], int first,
                                            int vocab_size) {
  if constexpr (kWide) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kVec16<T>) {
      Vec16<T> v;
#pragma unroll
      for (int j = 0; j < kVec16<T>; ++j) v.values[j] = values[i + j];
      store16(row + first + i, v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (first + i < vocab_size) store_global(row + first + i, values[i]);
    }
  }
}

// Loads a row of the options or noise table, 8 bytes at a time, because not every row is 16-byte
// aligned.
template <class T>
__device__ __forceinline__ T load_row(const T* row) {
  static_assert(sizeof(T) % sizeof(uint64_t) == 0);
  uint64_t words[sizeof(T) / sizeof(uint64_t)];
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(uint64_t); ++i) {
    words[i] = load_global(reinterpret_cast<const uint64_t*>(row) + i);
  }
  T value;
  memcpy(&value, words, sizeof value);
  return value;
}

// ---- Reductions of integers

template <class Combine>
__device__ __forceinline__ uint64_t warp_reduce(uint64_t value, const Combine& combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Reduces the values of all threads of the block. Every thread gets the result. combine(x, 0) must
// be x.
template <class Combine>
__device__ __forceinline__ uint64_t block_reduce(uint64_t value, Shared* shared,
                                                 const Combine& combine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // no thread still reads `sums`
  value = warp_reduce(value, combine);
  if (lane == 0) shared->sums[warp] = value;
  __syncthreads();
  return warp_reduce(lane < kWarps ? shared->sums[lane] : 0, combine);
}

struct Larger {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct Plus {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

// ---- Passes over the row

template <bool kWide>
struct Row {
  uint32_t* keys;     // [V]
  uint64_t* weights;  // [V]
  int vocab_size;
  Shared* shared;

  // Calls f(first, group) for each group of this thread. `first` is the id of the first token, and
  // `group` has the four keys.
  template <class F>
  __device__ __forceinline__ void for_each_group(const F& f) const {
    for (int first = kGroup * threadIdx.x; first < vocab_size; first += kGroup * kThreads) {
      uint32_t group[kGroup];
      load_group<kWide>(group, keys, first, vocab_size);
      f(first, group);
    }
  }

  // Computes x of every token (sample.h), writes the keys, and returns the highest rank. bias and
  // history are null if they are not needed.
  __device__ Rank adjust(const float* logits, const float* bias, const int32_t* history,
                         const SamplingOptions& options) const {
    Rank best = 0;
    for (int first = kGroup * threadIdx.x; first < vocab_size; first += kGroup * kThreads) {
      float x[kGroup], added[kGroup] = {};
      int32_t seen[kGroup] = {};
      uint32_t group[kGroup];
      load_group<kWide>(x, logits, first, vocab_size);
      if (bias) load_group<kWide>(added, bias, first, vocab_size);
      if (history) load_group<kWide>(seen, history, first, vocab_size);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (bias) x[i] += added[i];
        if (seen[i] != 0) x[i] = penalise(x[i], seen[i], options);
        group[i] = first + i < vocab_size ? key_of(x[i]) : 0;
        best = Larger()(best, rank_of(group[i], first + i));
      }
      store_group<kWide>(keys, group, first, vocab_size);
    }
    return block_reduce(best, shared, Larger());
  }

  // Returns the lowest rank that passes the filter `top` (TopK or TopP of sample.h). `measures` [V]
  // holds what each token at or above `threshold` adds to the filter's sum. If it is null, each
  // token adds 1. The tokens are added from the highest rank, `best`, down until the sum is enough
  // (top.reached). If the sum is still too small at `threshold`, the result is `threshold`.
  //
  // The result is found digit by digit (of kDigitBits bits), from the highest digit on. For each
  // digit, a histogram is made of the ranks that begin with the digits found so far. A bin holds
  // the sum of the measures of the ranks whose next digit is the number of the bin.
  template <class Top>
  __device__ Rank select(const Top& top, const uint64_t* measures, Rank threshold,
                         Rank best) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int shift = kRankBits - kDigitBits;
    while (shift > 0 && threshold >> shift == best >> shift) shift -= kDigitBits;
    Rank found = best >> (shift + kDigitBits);
    uint64_t above = 0;  // the sum over all ranks above those that begin with the digits found
    for (; shift >= 0; shift -= kDigitBits) {
#pragma unroll
      for (int digit = 0; digit < kBins; ++digit) shared->bins[digit][threadIdx.x] = 0;
      for_each_group([&](int first, const uint32_t (&group)[kGroup]) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const Rank rank = rank_of(group[i], first + i);
          if (rank < threshold || rank >> (shift + kDigitBits) != found) continue;
          shared->bins[(rank >> shift) % kBins][threadIdx.x] +=
              measures ? load_global(measures + first + i) : 1;
        }
      });
      __syncthreads();
      uint64_t sum = 0;
      for (int i = lane; i < kThreads; i += kWarp) sum += shared->bins[warp][i];
      sum = warp_reduce(sum, Plus());
      if (lane == 0) shared->sums[warp] = sum;
      __syncthreads();

      // Lane i computes the sum of the measures from the highest rank down to the ranks in bin i.
      // Every warp does this for itself, so that no warp has to wait for the result of another.
      uint64_t down_to = above;
      for (int digit = kBins - 1; digit >= lane; --digit) down_to += shared->sums[digit];
      const unsigned enough = __ballot_sync(kAllLanes, lane < kBins && top.reached(down_to));
      if (enough == 0) return threshold;
      const int digit = kWarp - 1 - __clz(static_cast<int>(enough));
      const uint64_t inside = shared->sums[digit];
      above = __shfl_sync(kAllLanes, down_to, digit) - inside;
      found = found << kDigitBits | static_cast<Rank>(digit);
      if (shift == kIdBits && inside == top.measure(static_cast<uint32_t>(found))) {
        found <<= kIdBits;  // only one token has this key, so the digits of its id do not matter
        break;
      }
    }
    return found > threshold ? found : threshold;
  }

  // Writes the weights of the tokens at or above `threshold`, and returns their sum.
  __device__ uint64_t weigh(const Weights& weight, Rank threshold) const {
    uint64_t total = 0;
    for_each_group([&](int first, const uint32_t (&group)[kGroup]) {
      uint64_t values[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        values[i] = rank_of(group[i], first + i) >= threshold ? weight(group[i]) : 0;
        total += values[i];
      }
      store_group<kWide>(weights, values, first, vocab_size);
    });
    return block_reduce(total, shared, Plus());
  }

  // Returns the token at or above `threshold` with the largest x / temperature + Gumbel noise.
  __device__ int64_t draw(const NoiseState& noise, float largest, double temperature,
                          Rank threshold) const {
    double highest = -INFINITY;
    int64_t chosen = kMaxVocab;
    for_each_group([&](int first, const uint32_t (&group)[kGroup]) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) any |= rank_of(group[i], first + i) >= threshold;
      if (!any) return;
      const PhiloxBlock random = noise_block(noise, first / kGroup);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (rank_of(group[i], first + i) < threshold) continue;
        const double score =
            scaled(value_of(group[i]), largest, temperature) + gumbel(random.words[i]);
        if (chosen == kMaxVocab || score > highest) {
          chosen = first + i;
          highest = score;
        }
      }
    });
    // Finds the highest score of the block, then the lowest id with this score. Scores are compared
    // as unsigned integers of the same order.
    uint64_t bits;
    memcpy(&bits, &highest, sizeof bits);
    bits = bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
    const uint64_t winner = block_reduce(bits, shared, Larger());
    return kMaxVocab -
           static_cast<int64_t>(block_reduce(
               bits == winner ? static_cast<uint64_t>(kMaxVocab - chosen) : 0, shared, Larger()));
  }
};

template <bool kWide>
__device__ int64_t choose(const SampleParams& p, int64_t n, int64_t row,
                          const SamplingOptions& options) {
  const Row<kWide> passes{p.keys + n * p.vocab_size, p.weights + n * p.vocab_size,
                          static_cast<int>(p.vocab_size), dynamic_shared<Shared>()};
  const Rank best = passes.adjust(
      p.logits + n * p.stride_logits_row, p.bias ? p.bias + row * p.vocab_size : nullptr,
      has_penalty(options) ? p.history + row * p.vocab_size : nullptr, options);
  if (!can_choose(best)) return -1;
  if (options.temperature == 0) return id_of_rank(best);

  const float largest = value_of(key_of_rank(best));
  Rank threshold = min_p_threshold(largest, options);
  if (options.top_k > 0) {
    threshold = passes.select(TopK{options.top_k}, nullptr, threshold, best);
  }
  if (options.top_p < 1) {
    const Weights weight{largest, options.temperature, weight_scale(p.vocab_size)};
    const uint64_t total = passes.weigh(weight, threshold);
    threshold = passes.select(TopP{weight, total, options.top_p}, passes.weights, threshold, best);
  }
  return passes.draw(load_row(p.noise + row), largest, options.temperature, threshold);
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const SampleParams p) {
  const int64_t n = blockIdx.x, row = load_global(p.rows + n);
  const int64_t token_id = choose<kWide>(p, n, row, load_row(p.options + row));
  if (threadIdx.x != 0) return;
  store_global(p.token_ids + n, token_id);
  if (token_id < 0) return;
  int32_t* history = p.history + row * p.vocab_size + token_id;
  store_global(history, load_global(history) + kChosenOnce);
  int64_t* step = &p.noise[row].step;
  store_global(step, load_global(step) + 1);
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  const bool wide =
      p.vocab_size % kGroup == 0 &&
      fit_vec16<float>({p.logits, p.history, p.bias, p.keys, p.weights}, {p.stride_logits_row});
  return launch(wide ? sample_kernel<true> : sample_kernel<false>,
                dim3(static_cast<unsigned>(p.num_rows)), dim3(kThreads), sizeof(Shared), stream, p);
}

}  // namespace mistral::cuda

// Chooses the next token from logits. Every row of a batch has its own options.
//
//   x      = logit + bias, then the repetition penalty (tokens of prompt and completion), then the
//            presence and frequency penalties (tokens of the completion), rounded to fp32
//   choice = at temperature 0: the token with the largest x
//            else: the token with the largest x / temperature + g, among the tokens that pass the
//            filters min_p, top_k and top_p, which are applied in this order
//
// If two tokens tie, the lower id wins. g = -log(-log(u)) is Gumbel noise, where u is random,
// between 0 and 1. With this noise, a token is chosen with its probability in the softmax of
// x / temperature over the tokens that are left (Gumbel 1954; Maddison et al. 2014,
// arXiv:1411.0030).
//
// u depends only on (seed, index, step, token), so the noise of a completion is the same on every
// device and in every batch. Take word token % 4 of the Philox block with the key (seed, index) and
// the counter (token / 4 + 1, step, 0, 0). u is the upper 53 bits of this word, divided by 2^53. It
// is also element `token` of what numpy returns for Generator(Philox(key=[seed, index], counter=[0,
// step, 0, 0])).random(V).
//
// The functions below define all of this for CPU and CUDA devices. Results that must agree between
// devices are computed in doubles or integers. Sums of probabilities are in fixed point, so their
// order does not matter.
#pragma once

#include <cmath>
#include <cstring>

#ifdef MISTRAL_CUDA
#include <cuda_runtime_api.h>
#endif

#include "common.h"
#include "philox.h"

namespace mistral {

// One row of the options table. The table is a float64 tensor [M, 7], where M is the number of
// completions for which there is room. It is in the memory of the device, so that a captured CUDA
// graph can be replayed in every step.
struct SamplingOptions {
  double temperature;         // 0: greedy
  double top_k;               // keep the k most likely tokens; 0: all
  double top_p;               // keep the most likely tokens until their probabilities sum to this;
                              // 1: all
  double min_p;               // keep tokens with at least this share of the highest probability;
                              // 0: all
  double repetition_penalty;  // divides an x > 0, multiplies any other x (Keskar et al. 2019,
                              // arXiv:1909.05858); 1: no penalty
  double presence_penalty;    // subtracted once from x of a token of the completion
  double frequency_penalty;   // subtracted from x for each time that the completion has the token
};
constexpr int64_t kSamplingOptionFields = 7;
static_assert(sizeof(SamplingOptions) == kSamplingOptionFields * sizeof(double));

// One row of the noise table, an int64 tensor [M, 3]. A completion has the same row in all tables.
struct NoiseState {
  uint64_t seed;
  uint64_t index;  // separates completions with the same seed
  int64_t step;    // the number of tokens chosen so far; each choice adds 1
};
constexpr int64_t kNoiseFields = 3;
static_assert(sizeof(NoiseState) == kNoiseFields * sizeof(int64_t));

// N rows of logits, and tables of M rows (options, noise, history and bias). Row n of the logits
// uses row rows[n] of the tables. No two rows of logits share a row of the tables. An element of
// `history` is 2 * (times that the token was chosen) + (1 if the token is in the prompt).
struct SampleParams {
  const float* logits;             // [N, V]
  const int64_t* rows;             // [N], rows of the tables
  const SamplingOptions* options;  // [M]
  NoiseState* noise;               // [M]
  int32_t* history;                // [M, V]; the call adds the chosen token
  const float* bias;               // [M, V]; null: no bias
  int64_t* token_ids;              // [N]; -1: an x is NaN, or all are -inf
  uint32_t* keys;                  // [N, V], scratch
  uint64_t* weights;               // [N, V], scratch
  int64_t num_rows;                // N
  int64_t vocab_size;              // V, at most kMaxVocab
  int64_t stride_logits_row;
};

constexpr int32_t kChosenOnce = 2;  // in `history`

namespace cpu {
void sample(const SampleParams& p, int threads);
}

#ifdef MISTRAL_CUDA
namespace cuda {
cudaError_t sample(const SampleParams& p, cudaStream_t stream);
}
#endif

// ---- Penalties

MISTRAL_HOST_DEVICE bool has_penalty(const SamplingOptions& o) {
  return o.repetition_penalty != 1 || o.presence_penalty != 0 || o.frequency_penalty != 0;
}

MISTRAL_HOST_DEVICE float penalise(float logit, int32_t history, const SamplingOptions& o) {
  double x = logit;
  if (history != 0) x = x > 0 ? x / o.repetition_penalty : x * o.repetition_penalty;
  const int32_t count = history / kChosenOnce;
  // An explicit fma: otherwise one compiler fuses the product and the sum, and another does not.
  if (count != 0) x = fma(-o.frequency_penalty, static_cast<double>(count), x - o.presence_penalty);
  return static_cast<float>(x);
}

// ---- Keys and ranks. A key is x as an unsigned integer: the larger x, the larger its key. A rank
// has the key in its high bits and kMaxVocab - 1 - id in its low bits. So no two ranks are equal,
// and the lower id wins a tie.

constexpr uint32_t kNanKey = 0xffffffff;  // larger than every other key, so the maximum finds a NaN

MISTRAL_HOST_DEVICE uint32_t key_of(float x) {
  if (x != x) return kNanKey;
  x += 0.0f;  // turns -0 into 0
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

MISTRAL_HOST_DEVICE float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000 ? key & 0x7fffffff : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

using Rank = uint64_t;
constexpr int kIdBits = 24;
constexpr int kRankBits = 32 + kIdBits;
constexpr int64_t kMaxVocab = int64_t{1} << kIdBits;

MISTRAL_HOST_DEVICE Rank rank_of(uint32_t key, int64_t id) {
  return static_cast<Rank>(key) << kIdBits | static_cast<Rank>(kMaxVocab - 1 - id);
}

MISTRAL_HOST_DEVICE uint32_t key_of_rank(Rank rank) {
  return static_cast<uint32_t>(rank >> kIdBits);
}

MISTRAL_HOST_DEVICE int64_t id_of_rank(Rank rank) {
  return kMaxVocab - 1 - static_cast<int64_t>(rank & (kMaxVocab - 1));
}

MISTRAL_HOST_DEVICE Rank higher(Rank a, Rank b) { return a > b ? a : b; }

// ---- Filters. A filter keeps the tokens whose rank is at or above a threshold.

// False if no token can be chosen: an x is NaN, or all are -inf.
MISTRAL_HOST_DEVICE bool can_choose(Rank best) {
  return key_of_rank(best) != kNanKey && key_of_rank(best) > key_of(-INFINITY);
}

// The token of the highest rank, or -1 if no token can be chosen.
MISTRAL_HOST_DEVICE int64_t greedy_choice(Rank best) {
  return can_choose(best) ? id_of_rank(best) : -1;
}

// log(p / p_max), where p is the probability of a token, and p_max that of the most likely token.
MISTRAL_HOST_DEVICE double scaled(float x, float largest, double temperature) {
  if (x == largest) return 0;  // inf - inf would be NaN
  return (static_cast<double>(x) - static_cast<double>(largest)) / temperature;
}

// The lowest rank that passes min_p. Tokens with x = -inf do not pass, even if min_p is 0.
MISTRAL_HOST_DEVICE Rank min_p_threshold(float largest, const SamplingOptions& o) {
  uint32_t key = key_of(-INFINITY) + 1;
  if (o.min_p > 0) {
    const double bound = fma(o.temperature, log(o.min_p), static_cast<double>(largest));
    auto x = static_cast<float>(bound);
    if (static_cast<double>(x) < bound) x = nextafterf(x, INFINITY);
    if (key_of(x) > key) key = key_of(x);
  }
  return static_cast<Rank>(key) << kIdBits;
}

// The probabilities of a row relative to the largest one, as integer multiples of a unit. The unit
// is as small as it can be while a sum over the vocabulary fits 63 bits: 2^-47 for 32768 tokens.
// Probabilities below half a unit become 0.
struct Weights {
  float largest;
  double temperature;
  double scale;

  MISTRAL_HOST_DEVICE uint64_t operator()(uint32_t key) const {
    const double w = exp(scaled(value_of(key), largest, temperature));
    return static_cast<uint64_t>(static_cast<int64_t>(w * scale + 0.5));
  }
};

MISTRAL_HOST_DEVICE double weight_scale(int64_t vocab_size) {
  double scale = static_cast<double>(int64_t{1} << 62);
  for (int64_t tokens = 1; tokens < vocab_size; tokens *= 2) scale /= 2;
  return scale;
}

// TopK and TopP are filters that sum a measure over the tokens, from the most likely token down,
// until the sum is large enough (`reached`). `measure` is what one token adds to the sum.
struct TopK {
  double k;
  MISTRAL_HOST_DEVICE uint64_t measure(uint32_t) const { return 1; }
  MISTRAL_HOST_DEVICE bool reached(uint64_t count) const { return static_cast<double>(count) >= k; }
};

struct TopP {
  Weights weights;
  uint64_t total;  // the sum over the tokens that pass min_p and top_k
  double p;
  MISTRAL_HOST_DEVICE uint64_t measure(uint32_t key) const { return weights(key); }
  MISTRAL_HOST_DEVICE bool reached(uint64_t mass) const {
    return static_cast<double>(mass) / static_cast<double>(total) >= p;
  }
};

// ---- Noise

constexpr int64_t kTokensPerBlock = 4;  // tokens that share a Philox block, a word for each

MISTRAL_HOST_DEVICE PhiloxBlock noise_block(const NoiseState& noise, int64_t block) {
  return philox({{noise.seed, noise.index}},
                {{static_cast<uint64_t>(block) + 1, static_cast<uint64_t>(noise.step), 0, 0}});
}

// A word below 2^11 gives -inf. A token with this noise is chosen only if no other token is left.
MISTRAL_HOST_DEVICE double gumbel(uint64_t word) {
  constexpr double kUnit = 1.0 / static_cast<double>(int64_t{1} << 53);
  return -log(-log(static_cast<double>(word >> 11) * kUnit));
}

}  // namespace mistral

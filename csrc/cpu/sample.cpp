// A task samples one row, in a few passes over the row. This file is compiled once, not for every
// instruction set, because most of the time goes into exp and log of the C library. A greedy choice
// needs neither of them, so highest_rank, which makes it, is compiled for every set.
#include "../sample.h"

#include "kernels.h"
#include "parallel.h"

namespace mistral::cpu {
namespace {

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
static_assert(kIdBits % kDigitBits == 0 && kRankBits % kDigitBits == 0);

// Computes x, the logit after bias and penalties, of every token for row n of the logits. Writes
// the key of each x to `keys`, and returns the highest rank. A key is x as an unsigned integer in
// the same order. A rank is a key and a token id (sample.h).
Rank adjust(const SampleParams& p, int64_t n, const SamplingOptions& options, uint32_t* keys) {
  const float* logits = p.logits + n * p.stride_logits_row;
  const float* bias = p.bias ? p.bias + p.rows[n] * p.vocab_size : nullptr;
  const int32_t* history = has_penalty(options) ? p.history + p.rows[n] * p.vocab_size : nullptr;
  uint32_t highest = 0;
  int64_t first = 0;  // the first token with the highest key
  for (int64_t id = 0; id < p.vocab_size; ++id) {
    float x = logits[id];
    if (bias) x += bias[id];
    if (history && history[id] != 0) x = penalise(x, history[id], options);
    keys[id] = key_of(x);
    if (keys[id] > highest) {
      highest = keys[id];
      first = id;
    }
  }
  return rank_of(highest, first);
}

// Returns the lowest rank that passes the filter `top` (TopK or TopP of sample.h). Such a filter
// sums a measure over the tokens, from the highest rank down, until the sum is enough. Only the
// tokens at or above the rank `threshold` take part. If their sum is not enough, the result is
// `threshold`. `measures` [V] holds their measures. If it is null, each measure is 1.
//
// The result is found digit by digit, from its highest digit on. For each digit, a histogram is
// made of the ranks that begin with the digits found so far. A bin has the sum of the measures of
// the ranks whose next digit is its number. The bins are added from the highest down. The bin with
// which the sum is enough is the next digit.
template <class Top>
Rank select(const Top& top, const uint32_t* keys, const uint64_t* measures, int64_t vocab_size,
            Rank threshold) {
  Rank found = 0;
  uint64_t above = 0;  // the sum over all ranks above those that begin with `found`
  for (int shift = kRankBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    uint64_t bins[kBins] = {};
    for (int64_t id = 0; id < vocab_size; ++id) {
      const Rank rank = rank_of(keys[id], id);
      if (rank >= threshold && rank >> (shift + kDigitBits) == found) {
        bins[(rank >> shift) % kBins] += measures ? measures[id] : 1;
      }
    }
    int digit = kBins;
    uint64_t sum = above;
    while (digit == kBins || !top.reached(sum)) {
      if (digit == 0) return threshold;
      sum += bins[--digit];
    }
    above = sum - bins[digit];
    found = found << kDigitBits | static_cast<Rank>(digit);
    if (shift == kIdBits && bins[digit] == top.measure(static_cast<uint32_t>(found))) {
      found <<= kIdBits;  // one token alone has this key, so the digits of its id do not matter
      break;
    }
  }
  return found > threshold ? found : threshold;
}

// Writes the weights (Weights of sample.h) of the tokens at or above the rank `threshold`, and
// returns their sum. Leaves the other elements of `weights` as they are.
uint64_t weigh(const Weights& weight, const uint32_t* keys, int64_t vocab_size, Rank threshold,
               uint64_t* weights) {
  uint64_t total = 0;
  for (int64_t id = 0; id < vocab_size; ++id) {
    if (rank_of(keys[id], id) < threshold) continue;
    weights[id] = weight(keys[id]);
    total += weights[id];
  }
  return total;
}

// An upper bound of gumbel(word) = -log(-log(u)), found without a logarithm. u is the upper 53 bits
// of the word, as a fraction. -log(u) is at least 1 - u, so gumbel(word) is at most -log(1 - u).
// With the binary exponent of 1 - u one finds n such that 1 - u is at least 2^-n. Then n log(2) is
// a bound. The addend 1e-9 covers the rounding error of gumbel.
double gumbel_bound(uint64_t word) {
  constexpr double kLog2 = 0.6931471805599453;
  const uint64_t units = (uint64_t{1} << 53) - (word >> 11);  // 1 - u, in units of 2^-53
  return static_cast<double>(__builtin_clzll(units) - 10) * kLog2 + 1e-9;
}

// Draws one of the tokens at or above the rank `threshold`: the one with the highest score, which
// is a scaled logit plus noise (gumbel). If even the upper bound of its noise would not make a
// token win, the token is skipped. Most tokens are, so few logarithms are computed.
int64_t draw(const NoiseState& noise, float largest, double temperature, const uint32_t* keys,
             int64_t vocab_size, Rank threshold) {
  int64_t chosen = -1;
  double highest = 0;
  for (int64_t block = 0; block * kTokensPerBlock < vocab_size; ++block) {
    const int64_t first = block * kTokensPerBlock;
    const int64_t end = mistral::min(first + kTokensPerBlock, vocab_size);
    PhiloxBlock random;
    bool made = false;
    for (int64_t id = first; id < end; ++id) {
      if (rank_of(keys[id], id) < threshold) continue;
      if (!made) random = noise_block(noise, block);
      made = true;
      const uint64_t word = random.words[id - first];
      const double base = scaled(value_of(keys[id]), largest, temperature);
      if (chosen >= 0 && base + gumbel_bound(word) < highest) continue;
      const double score = base + gumbel(word);
      if (chosen < 0 || score > highest) {
        chosen = id;
        highest = score;
      }
    }
  }
  return chosen;
}

int64_t choose(const SampleParams& p, int64_t n, const Kernels& kernels) {
  const SamplingOptions& options = p.options[p.rows[n]];
  const int64_t vocab_size = p.vocab_size;
  uint32_t* keys = p.keys + n * vocab_size;
  uint64_t* weights = p.weights + n * vocab_size;

  if (options.temperature == 0 && !p.bias && !has_penalty(options)) {
    return greedy_choice(kernels.highest_rank(p.logits + n * p.stride_logits_row, vocab_size));
  }
  const Rank best = adjust(p, n, options, keys);
  if (options.temperature == 0 || !can_choose(best)) return greedy_choice(best);

  const float largest = value_of(key_of_rank(best));
  Rank threshold = min_p_threshold(largest, options);
  if (options.top_k > 0) {
    threshold = select(TopK{options.top_k}, keys, nullptr, vocab_size, threshold);
  }
  if (options.top_p < 1) {
    const Weights weight{largest, options.temperature, weight_scale(vocab_size)};
    const uint64_t total = weigh(weight, keys, vocab_size, threshold, weights);
    threshold = select(TopP{weight, total, options.top_p}, keys, weights, vocab_size, threshold);
  }
  return draw(p.noise[p.rows[n]], largest, options.temperature, keys, vocab_size, threshold);
}

}  // namespace

void sample(const SampleParams& p, int threads) {
  const Kernels& kernels = active_kernels();
  parallel_for(threads, p.num_rows, [&](int64_t n) {
    const int64_t token_id = choose(p, n, kernels);
    p.token_ids[n] = token_id;
    if (token_id < 0) return;
    p.history[p.rows[n] * p.vocab_size + token_id] += kChosenOnce;
    p.noise[p.rows[n]].step += 1;
  });
}

}  // namespace mistral::cpu

// A task computes the loss of one row of logits. It reads the row once for the largest logit and
// once for the sum of exponentials. If the gradient is wanted, it reads the row a third time and
// overwrites it with the gradient.
#include "../cross_entropy.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

// The number of vectors that are summed before the sum is added to the total. One running sum over
// all logits would lose digits.
constexpr int64_t kVectorsPerSum = 32;

template <class T>
float largest_of(const T* x, int64_t count) {
  Vec highest = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) highest = vmax(highest, load(x + i));
  float maximum = largest(highest);
  for (; i < count; ++i) maximum = fmaxf(maximum, to_float(x[i]));
  return maximum;
}

template <class T>
float sum_of_exp(const T* x, int64_t count, float maximum) {
  float total = 0.0f;
  int64_t i = 0;
  while (i + Vec::width <= count) {
    const int64_t end = mistral::min(i + kVectorsPerSum * Vec::width, count);
    Vec block = broadcast(0.0f);
    for (; i + Vec::width <= end; i += Vec::width) {
      block = block + exp(load(x + i) - broadcast(maximum));
    }
    total += sum(block);
  }
  for (; i < count; ++i) total += expf(to_float(x[i]) - maximum);
  return total;
}

// x = factor * exp(x - maximum) / total
template <class T>
void to_probabilities(T* x, int64_t count, float maximum, float total, float factor) {
  const auto probability = [&](Vec logit) {
    return exp(logit - broadcast(maximum)) * broadcast(factor / total);
  };
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(x + i, probability(load(x + i)));
  if (i < count) store_first(x + i, probability(load_first(x + i, count - i)), count - i);
}

template <class T>
float row_loss(const CrossEntropyParams& p, int64_t token) {
  T* logits = static_cast<T*>(p.logits) + token * p.stride_logits_token;
  T* of_target = logits + p.targets[token];
  const float logit = to_float(*of_target);
  const float maximum = largest_of(logits, p.vocab);
  const float total = sum_of_exp(logits, p.vocab, maximum);
  if (p.factors) {
    const float factor = p.factors[token];
    to_probabilities(logits, p.vocab, maximum, total, factor);
    // The gradient of the target is computed from its logit. The probability in the row has been
    // rounded to T already, so its difference from 1 would be rounded twice.
    from_float(factor * (expf(logit - maximum) / total - 1.0f), of_target);
  }
  return logf(total) + (maximum - logit);
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.tokens, [&](int64_t token) { p.loss[token] = row_loss<T>(p, token); });
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

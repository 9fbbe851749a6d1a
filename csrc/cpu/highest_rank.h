// Finds the token with the largest logit of a row, as a rank: its key and its id in one integer. A
// key is a logit as an unsigned integer, and a larger logit has a larger key (sample.h).
#pragma once

#include "../sample.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {

// The number of logits in a block. They are so few that their keys stay in the L1 cache.
constexpr int64_t kKeysPerBlock = 512;

// The same as key_of (sample.h), but without branches, because compilers do not vectorise a loop
// with branches.
MISTRAL_HOST_DEVICE uint32_t branchless_key(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t key = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return x != x ? kNanKey : key;
}

// Returns `count` numbers in fp32, at most kKeysPerBlock. Writes them to `buffer` if they are not
// in fp32 already.
template <class T>
const float* as_floats(const T* x, int64_t count, float* buffer) {
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(buffer + i, load(x + i));
  for (; i < count; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}
inline const float* as_floats(const float* x, int64_t, float*) { return x; }

// Returns the highest rank of a row of logits. Finds the highest key of each block. If it is higher
// than all keys of earlier blocks, also finds the first token of the block that has this key. The
// loops that make keys and find the highest key are plain enough for compilers to vectorise. A loop
// that also remembered the token would not be.
template <class T>
Rank highest_rank_of(const T* logits, int64_t vocab_size) {
  constexpr uint32_t kSign = 0x80000000;  // AVX2 and older sets compare only signed integers
  uint32_t highest = 0;
  int64_t first = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kKeysPerBlock) {
    const int64_t count = mistral::min(kKeysPerBlock, vocab_size - begin);
    float buffer[kKeysPerBlock];
    uint32_t keys[kKeysPerBlock];
    const float* x = as_floats(logits + begin, count, buffer);
    for (int64_t i = 0; i < count; ++i) keys[i] = branchless_key(x[i]);
    int32_t most = INT32_MIN;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = static_cast<int32_t>(keys[i] ^ kSign);
      most = key > most ? key : most;
    }
    const uint32_t of_block = static_cast<uint32_t>(most) ^ kSign;
    if (of_block <= highest) continue;
    highest = of_block;
    first = begin;
    while (keys[first - begin] != highest) ++first;
  }
  return rank_of(highest, first);
}

}  // namespace mistral::cpu::MISTRAL_ISA

// Philox4x64-10, a random number generator without state (Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3"). It maps each key and counter to four words of 64 random bits.
#pragma once

#include "common.h"

namespace mistral {

struct PhiloxKey {
  uint64_t words[2];
};

struct PhiloxBlock {
  uint64_t words[4];
};

MISTRAL_HOST_DEVICE PhiloxBlock philox(PhiloxKey key, PhiloxBlock counter) {
  for (int round = 0; round < 10; ++round) {
    const auto product0 = static_cast<unsigned __int128>(counter.words[0]) * 0xD2E7470EE14C6C93u;
    const auto product1 = static_cast<unsigned __int128>(counter.words[2]) * 0xCA5A826395121157u;
    counter = {{static_cast<uint64_t>(product1 >> 64) ^ counter.words[1] ^ key.words[0],
                static_cast<uint64_t>(product1),
                static_cast<uint64_t>(product0 >> 64) ^ counter.words[3] ^ key.words[1],
                static_cast<uint64_t>(product0)}};
    key.words[0] += 0x9E3779B97F4A7C15u;  // 2^64 * (golden ratio - 1)
    key.words[1] += 0xBB67AE8584CAA73Bu;  // 2^64 * (sqrt(3) - 1)
  }
  return counter;
}

}  // namespace mistral

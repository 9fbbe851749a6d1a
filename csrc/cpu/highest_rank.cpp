// The greedy choice among logits without bias and penalties.
#include "highest_rank.h"

#include "kernels.h"

namespace mistral::cpu::MISTRAL_ISA {

Rank highest_rank(const float* logits, int64_t vocab_size) {
  return highest_rank_of(logits, vocab_size);
}

}  // namespace mistral::cpu::MISTRAL_ISA

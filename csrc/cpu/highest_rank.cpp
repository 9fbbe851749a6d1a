// Finds the highest rank for sample.cpp, which calls this function for greedy choices without bias
// and penalties. sample.cpp is compiled only once, but this file is compiled for each instruction
// set.
#include "highest_rank.h"

#include "kernels.h"

namespace mistral::cpu::MISTRAL_ISA {

Rank highest_rank(const float* logits, int64_t vocab_size) {
  return highest_rank_of(logits, vocab_size);
}

}  // namespace mistral::cpu::MISTRAL_ISA

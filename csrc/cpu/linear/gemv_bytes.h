// gemv with activations of 8 bits. Each block of 32 activations of a token is rounded to integers,
// in units of a 127th of its largest magnitude. The integers are multiplied by weights of 4 to 6
// bits. This adds far less error than such weights have, and takes a fifth of the instructions of
// floats.
#pragma once

#include "byte_chunk.h"
#include "gemv_chunks.h"

namespace mistral::cpu::MISTRAL_ISA {

// Stands for the products of bytes of a format, in place of a chunk type.
template <WeightFormat format>
struct InBytes {
  struct Arithmetic {
    using Element = char;
  };
};

#if defined(MISTRAL_VECTORS)
template <WeightFormat format>
struct Few<InBytes<format>> : FewInChunks<ByteChunk<format>> {};
#endif

}  // namespace mistral::cpu::MISTRAL_ISA

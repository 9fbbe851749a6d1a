// gemv with activations rounded to 8 bits (byte_activations.h), which are multiplied in integers by
// weights of 4 to 6 bits. The rounding adds far less error than such weights have. The integers
// need a fifth of the instructions of floats.
#pragma once

#include "byte_chunk.h"
#include "gemv_chunks.h"

namespace mistral::cpu::MISTRAL_ISA {

// A stand-in for a chunk type: products in bytes of weights of this format.
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

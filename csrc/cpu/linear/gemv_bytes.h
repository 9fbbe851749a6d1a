// gemv with activations rounded to 8 bits (byte_activations.h). They are multiplied in integers by
// weights of 4 to 6 bits. Their rounding adds far less error than that of the weights. Products in
// integers need a fifth of the instructions of products in floats.
#pragma once

#include "byte_chunk.h"
#include "gemv_chunks.h"

namespace mistral::cpu::MISTRAL_ISA {

// A tag in the place of a chunk type (formats.h). It selects products in bytes (Few, below).
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

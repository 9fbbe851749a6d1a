// The letters for shapes, and the element types, that all kernels and params structs share. Numbers
// in parentheses are those of Mistral 7B.
//
//   T    number of new tokens of a call; the tokens of all sequences are packed one after another
//   S    number of sequences of a call
//   E    model dimension (4096)
//   F    hidden dimension of the feed-forward block (14336)
//   V    size of the vocabulary
//   Hq   number of query heads (32)
//   Hkv  number of key/value heads (8)
//   G    number of query heads that share one key/value head, Hq / Hkv (4)
//   D    head dimension (128)
//   W    sliding window: the number of keys that a query sees, its own included (4096)
//   C    number of slots of one sequence's ring (ring.h)
//   R    number of rows of the key or value pool of one layer; a ring has Hkv * C rows
//
// A comment beside each pointer of a params struct gives its shape. A stride is named after the
// axis that it steps over, and counts elements unless its comment says bytes. The last axis always
// has stride 1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MISTRAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
// These headers are compiled once per instruction set, so these functions must be inlined always.
// The linker keeps a single out-of-line copy of an inline function. If it kept the copy for
// AVX-512, the scalar code would call that copy too, even on a processor without AVX-512.
#define MISTRAL_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace mistral {

enum class DType { f32, bf16, f16 };

// Types that only store 16-bit floating-point numbers. They have no arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

MISTRAL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MISTRAL_HOST_DEVICE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
MISTRAL_HOST_DEVICE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f with a value of the C++ type that stores `dtype`. For example:
// with_dtype(d, [&](auto t) { using T = decltype(t); ... }).
template <class F>
[[gnu::always_inline]] inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}

// The largest head dimension, for which the CPU kernels of attention have arrays. Every head
// dimension is a multiple of 32: RoPE rotates the two halves of a head together, so each half must
// be a whole number of 16-lane vectors.
constexpr int64_t kMaxHeadDim = 256;
constexpr bool is_head_dim(int64_t dim) { return dim >= 32 && dim % 32 == 0 && dim <= kMaxHeadDim; }

}  // namespace mistral

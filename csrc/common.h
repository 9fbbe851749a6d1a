// The letters for shapes, and the element types, that all kernels and params structs share.
//
//   T    new tokens of a call, all sequences packed one after another
//   S    sequences of a call
//   E    model dimension (4096 in Mistral 7B)
//   F    hidden dimension of the feed-forward block (14336)
//   V    vocabulary
//   Hq   query heads (32)         Hkv  key/value heads (8)
//   G    query heads that share one key/value head, Hq / Hkv
//   D    head dimension (128)
//   W    sliding window: the keys that a query sees, itself included (4096)
//   C    slots of one sequence's ring
//   R    rows of the key or value pool of one layer: the sum over its rings of Hkv * C
//
// A comment beside each pointer of a params struct gives its shape. Strides count elements and are
// named after the axis that they step over. The last axis always has stride 1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MISTRAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
// These headers are compiled once per instruction set, so these functions must be inlined always.
// The linker keeps a single out-of-line copy of an inline function. If it kept the copy for
// AVX-512, the scalar code would call that copy too.
#define MISTRAL_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace mistral {

enum class DType { f32, bf16, f16 };

// The types that store 16-bit numbers. They have no arithmetic of their own.
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

// The largest head dimension. Every head dimension is a multiple of 32. RoPE rotates the two halves
// of a head together, so each half must be a whole number of 16-lane vectors.
constexpr int64_t kMaxHeadDim = 256;
constexpr bool is_head_dim(int64_t dim) { return dim >= 32 && dim % 32 == 0 && dim <= kMaxHeadDim; }

}  // namespace mistral

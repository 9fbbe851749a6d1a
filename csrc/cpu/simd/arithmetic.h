// Floats are multiplied in one of two ways: in fp32, or in pairs of bf16. For pairs the instruction
// set must have an instruction that multiplies two elements of each lane and adds both products to
// the lane's sum.
//
// Element is the type of the factors. Operand is a vector of elements. A lane of an operand holds
// kDepth elements, whose products are added to the same sum. An operand has kStep elements.
#pragma once

#include "simd.h"

namespace mistral::cpu::MISTRAL_ISA {

struct Fp32 {
  using Element = float;
  using Operand = Vec;
  static constexpr int64_t kDepth = 1;

  static Operand load(const float* x) { return MISTRAL_ISA::load(x); }
  static Operand splat(const float* x) { return broadcast(*x); }
  static void store(float* p, Operand x) { MISTRAL_ISA::store(p, x); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return fma(a, b, c); }

  // Loads kStep neighbouring elements of memory and widens them to Element.
  template <class T>
  static Operand load_row(const T* x) {
    return MISTRAL_ISA::load(x);
  }
  // Loads kStep columns of kDepth rows, as kDepth operands. A lane gets one column of all the rows.
  // So the products of these rows are added to the same sum.
  template <class T>
  static void load_columns(const T* const rows[kDepth], Operand out[kDepth]) {
    out[0] = MISTRAL_ISA::load(rows[0]);
  }
  // Rounds the kStep lanes of kDepth vectors to Element.
  static Operand convert(const Vec x[kDepth]) { return x[0]; }
};

#if defined(MISTRAL_BF16_PAIRS)

struct Bf16 {
  using Element = bf16;
  using Operand = Pairs;
  static constexpr int64_t kDepth = 2;

  static Operand load(const bf16* x) { return load_pairs(x); }
  static Operand splat(const bf16* x) { return broadcast_pair(x); }
  static void store(bf16* p, Operand x) { store_pairs(p, x); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return dot(a, b, c); }

  static Operand load_row(const bf16* x) { return load_pairs(x); }
  static void load_columns(const bf16* const rows[kDepth], Operand out[kDepth]) {
    pair_up(load_pairs(rows[0]), load_pairs(rows[1]), out);
  }
  static Operand convert(const Vec x[kDepth]) { return to_pairs(x[0], x[1]); }
};

#endif

// The arithmetic that multiplies activations of type T.
template <class T>
struct ArithmeticOf {
  using type = Fp32;
};
#if defined(MISTRAL_BF16_PAIRS)
template <>
struct ArithmeticOf<bf16> {
  using type = Bf16;
};
#endif

template <class Arithmetic>
constexpr int64_t kStep = Arithmetic::kDepth * Vec::width;  // the number of elements in an operand

}  // namespace mistral::cpu::MISTRAL_ISA

// Compares the kernels of an instruction set with the scalar kernels, on random inputs.
//
// The rule is that of tests/tolerance.py: the largest error is at most twice that of the plain
// computation, plus a floor. The scalar kernel in the dtype is the plain computation. The exact
// result of a product of weights is computed in doubles (linear.cpp). For the other ops, the scalar
// kernel in fp32 stands for the exact result. In fp32 this is the plain computation too, which has
// errors of its own. So the floor is doubled there.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/ops.h"

// The conversions of simd.h, as the scalar kernels have them.
#define MISTRAL_ISA conversions
#include "../../csrc/cpu/simd/simd.h"
#undef MISTRAL_ISA

namespace mistral::comparison {

using cpu::conversions::from_float;
using cpu::conversions::to_float;
using Floats = std::vector<float>;

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float> ? DType::f32 : std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
}
template <class T>
constexpr float floor_of() {  // of tests/tolerance.py
  return std::is_same_v<T, float>  ? 4 * 0x1p-23f
         : std::is_same_v<T, bf16> ? 0.5f * 0x1p-7f
                                   : 0.5f * 0x1p-10f;
}
template <class T>
float rounded_to(float x) {
  T out;
  from_float(x, &out);
  return to_float(out);
}

// A set of kernels. Where the processor does not run the set, `selected` is another set, and linear
// is called by its address.
struct Set {
  std::string name;
  void (*linear)(const LinearParams& p, int threads);
  int64_t (*linear_scratch_bytes)(const LinearParams& p);
  bool (*linear_rounds)(DType dtype, WeightFormat format, int64_t tokens);
  const char* selected;
  bool linear_alone;  // all other kernels are those of another set
};

// A set that this processor runs.
Set set_of(const char* name);
// Makes a set the one in use.
void use(const Set& set);
const Set& in_use();
extern const Set kScalar;

// Says what was compared, and counts what was not close.
void report(const std::string& label, bool close, const std::string& detail);
int comparisons();
int failures();

// Random inputs: rounded to T, and held as Stored, which is T, or float for the exact result. Two
// of the same seed have the same numbers.
template <class T, class Stored>
class Data {
 public:
  using Type = Stored;
  using Rounded = T;
  static constexpr DType kType = dtype_of<Stored>();

  explicit Data(uint64_t seed) : state_(seed) {}

  static Stored convert(float x) {
    Stored out;
    from_float(rounded_to<T>(x), &out);
    return out;
  }
  std::vector<Stored> normal(int64_t count, float scale = 1.0f) {
    std::vector<Stored> out(static_cast<size_t>(count));
    for (Stored& x : out) x = convert(scale * gauss());
    return out;
  }
  Floats floats(int64_t count, float scale = 1.0f) {
    Floats out(static_cast<size_t>(count));
    for (float& x : out) x = scale * gauss();
    return out;
  }
  int64_t integer(int64_t below) { return static_cast<int64_t>(random() % uint64_t(below)); }
  // Nearly normal: a sum of four uniform numbers, of variance 1.
  float gauss() {
    const uint64_t bits = random();
    uint64_t sum = 0;
    for (int i = 0; i < 64; i += 16) sum += bits >> i & 0xffff;
    return (static_cast<float>(sum) * 0x1p-16f - 2) * 1.7320508f;
  }
  // splitmix64: in an emulated processor the library's generators take longer than the kernels.
  uint64_t random() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }

 private:
  uint64_t state_;
};

template <class T>
Floats widened(const std::vector<T>& x) {
  Floats out;
  for (const T& value : x) out.push_back(to_float(value));
  return out;
}

inline float largest(const Floats& x) {
  float most = 0;
  for (float value : x) most = std::fabs(value) > most ? std::fabs(value) : most;
  return most;
}
// NaN if the difference of two is.
inline float largest_error(const Floats& x, const Floats& exact) {
  float most = x.size() == exact.size() ? 0.0f : NAN;
  for (size_t i = 0; i < x.size() && most == most; ++i) {
    const float error = std::fabs(x[i] - exact[i]);
    if (!(error <= most)) most = error;
  }
  return most;
}

template <class T>
void expect_close(const std::string& label, const Floats& actual, const Floats& plain,
                  const Floats& exact, float floor = floor_of<T>()) {
  const float error = largest_error(actual, exact);
  const float allowed = 2 * largest_error(plain, exact) + floor * largest(exact);
  char detail[80];
  snprintf(detail, sizeof detail, "error %g, allowed %g", double(error), double(allowed));
  report(label, error <= allowed, detail);
}

// f(data): the outputs of an op for inputs of `data`, in one vector per magnitude.
template <class T, class F>
void compare(const Set& set, const std::string& label, uint64_t seed, const F& f) {
  use(set);
  const std::vector<Floats> actual = f(Data<T, T>(seed));
  use(kScalar);
  const std::vector<Floats> plain = f(Data<T, T>(seed)), exact = f(Data<T, float>(seed));
  constexpr float kFloor = (std::is_same_v<T, float> ? 2 : 1) * floor_of<T>();
  for (size_t i = 0; i < exact.size(); ++i) {
    expect_close<T>(label + ", output " + std::to_string(i), actual[i], plain[i], exact[i], kFloor);
  }
}

template <class F>
void for_each_dtype(const F& f) {
  f(float{}, "fp32");
  f(bf16{}, "bf16");
  f(f16{}, "fp16");
}

// The comparisons, a file for each subject.
void compare_attention(const Set& set);
void compare_linear(const Set& set);
void compare_lora(const Set& set);
void compare_quantize(const Set& set);
void compare_rows(const Set& set);    // ops of rows
void compare_sample(const Set& set);  // with the tokens that x86 chooses

constexpr int kThreads = 2;

}  // namespace mistral::comparison

// Products with weights of every format, few and many tokens, and their gradient.
#include <cstring>
#include <numeric>

#include "weights.h"

namespace mistral::comparison {
namespace {

// Memory that begins at a multiple of 64.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(static_cast<size_t>(bytes) + 64, char(-1)) {}
  void* begin() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64;
  }
  std::vector<char> memory;
};

struct Call {
  WeightFormat format;
  int64_t group, tokens, inputs, rows;
  Epilogue epilogue = Epilogue::store;
  bool norm = false;
  bool exact = true;
};

std::string label_of(const Call& call, const std::string& dtype) {
  return std::string("linear, ") + info(call.format).name + " of " + std::to_string(call.group) +
         ", " + dtype + ", T " + std::to_string(call.tokens) + ", K " +
         std::to_string(call.inputs) + ", N " + std::to_string(call.rows) +
         (call.exact ? "" : ", rounded");
}

// x W^T with the set in use, for activations x. The weights follow from `data`.
template <class Data>
Floats multiply(Data& data, const Call& call, const std::vector<typename Data::Type>& x) {
  const bool swiglu = call.epilogue == Epilogue::swiglu;
  auto first = random_weight(data, call.format, call.rows, call.inputs, call.group);
  auto second = random_weight(data, call.format, call.rows, call.inputs, call.group);
  const int64_t outputs = swiglu ? call.rows : 2 * call.rows;
  const auto norm = data.normal(call.inputs);
  const Floats added = data.floats(call.tokens * 2 * call.rows);
  auto out = data.normal(call.tokens * outputs);
  LinearParams p{};
  p.dtype = Data::kType;
  p.epilogue = call.epilogue;
  p.x = x.data();
  p.norm = call.norm ? norm.data() : nullptr;
  p.out = out.data();
  p.added = call.norm && call.epilogue != Epilogue::add ? added.data() : nullptr;
  p.parts[0] = first.part;
  p.parts[1] = second.part;
  p.num_parts = 2;
  p.tokens = call.tokens;
  p.inputs = p.stride_x_token = call.inputs;
  p.stride_out_token = outputs;
  p.stride_added_token = 2 * call.rows;
  p.eps = 1e-5f;
  p.exact = call.exact;
  Scratch scratch(in_use().linear_scratch_bytes(p));
  p.scratch = scratch.begin();
  in_use().linear(p, kThreads);
  return widened(out);
}

// A weight's values [rows, inputs] in fp32.
template <class T>
Floats dequantized(const Weight<T>& weight, int64_t inputs) {
  std::vector<int64_t> ids(static_cast<size_t>(weight.part.rows));
  std::iota(ids.begin(), ids.end(), 0);
  Floats out(ids.size() * static_cast<size_t>(inputs));
  EmbeddingParams p{DType::f32, ids.data(), weight.part, out.data(), weight.part.rows, inputs};
  use(kScalar);
  cpu::embedding(p, 1);
  return out;
}

// The result of `multiply` with the same arguments, computed in doubles. `data` holds floats, so
// that no result is rounded to a smaller dtype.
template <class Data>
Floats multiply_in_doubles(Data& data, const Call& call, const Floats& x) {
  const bool swiglu = call.epilogue == Epilogue::swiglu;
  const auto first = random_weight(data, call.format, call.rows, call.inputs, call.group);
  const auto second = random_weight(data, call.format, call.rows, call.inputs, call.group);
  Floats weights = dequantized(first, call.inputs);
  const Floats more = dequantized(second, call.inputs);
  weights.insert(weights.end(), more.begin(), more.end());
  const Floats norm = data.normal(call.inputs), added = data.floats(call.tokens * 2 * call.rows);
  const auto rows = static_cast<size_t>(2 * call.rows), inputs = static_cast<size_t>(call.inputs);
  const size_t outputs = swiglu ? rows / 2 : rows;
  Floats out = data.normal(call.tokens * static_cast<int64_t>(outputs));
  for (size_t token = 0; token < static_cast<size_t>(call.tokens); ++token) {
    std::vector<double> input(x.begin() + long(token * inputs),
                              x.begin() + long((token + 1) * inputs));
    if (call.norm) {
      double squares = 0;
      for (double value : input) squares += value * value;
      const double scale = 1 / std::sqrt(squares / double(inputs) + double(1e-5f));
      for (size_t k = 0; k < inputs; ++k) input[k] *= scale * double(norm[k]);
    }
    std::vector<double> product(rows, 0.0);
    for (size_t row = 0; row < rows; ++row) {
      for (size_t k = 0; k < inputs; ++k) {
        product[row] += input[k] * double(weights[row * inputs + k]);
      }
      if (call.norm && call.epilogue != Epilogue::add) {
        product[row] += double(added[token * rows + row]);
      }
    }
    for (size_t i = 0; i < outputs; ++i) {
      float& result = out[token * outputs + i];
      const double before = call.epilogue == Epilogue::add ? double(result) : 0.0;
      const double gate = product[i];
      result = float(swiglu ? gate / (1 + std::exp(-gate)) * product[i + outputs] : before + gate);
    }
  }
  return out;
}

template <class T>
void compare_product(const Set& set, const std::string& label, const Call& call,
                     const std::vector<T>& x) {
  const auto seed = static_cast<uint64_t>(call.tokens) + 1;
  use(set);
  Data<T, T> data(seed), same(seed);
  const Floats actual = multiply(data, call, x);
  use(kScalar);
  const Floats plain = multiply(same, call, x);
  Data<T, float> in_floats(seed);
  const Floats exact = multiply_in_doubles(in_floats, call, widened(x));
  expect_close<T>(label, actual, plain, exact);
  // A wrong `exact` would allow any error. In fp32, the scalar kernel must agree with it up to the
  // errors of a sum of K products.
  if (std::is_same_v<T, float>) {
    const float limit = 0x1p-23f * float(call.inputs + 8) * largest(exact);
    const bool agrees = largest_error(plain, exact) <= limit;
    report(label + ", reference", agrees, "the scalar kernel and the doubles differ");
  }
}

template <class T>
void compare_exact(const Set& set, const std::string& dtype, const Call& call) {
  // Small enough that SwiGLU does not make one output many times as large as the others.
  const float scale = call.epilogue == Epilogue::swiglu ? 2 / std::sqrt(float(call.inputs)) : 1;
  const auto x =
      Data<T, T>(static_cast<uint64_t>(call.tokens)).normal(call.tokens * call.inputs, scale);
  compare_product<T>(set, label_of(call, dtype), call, x);
}

// Activations whose largest is just below a power of two. Those next to it in 16-bit integers have
// high bytes that do not fit.
template <class T>
void compare_largest(const Set& set, const std::string& dtype, const Call& call) {
  auto x = Data<T, T>(6).normal(call.tokens * call.inputs);
  for (int64_t token = 0; token < call.tokens; ++token) {
    const float largest = token % 2 ? 3.984375f : -3.984375f;  // all bits of bf16
    x[static_cast<size_t>(token * call.inputs + 5)] = Data<T, T>::convert(largest);
  }
  compare_product<T>(set, label_of(call, dtype) + ", largest", call, x);
}

// Each block of 32 in integers of a 127th of its largest magnitude.
Floats rounded_to_bytes(const Floats& x) {
  Floats out(x.size());
  for (size_t begin = 0; begin < x.size(); begin += 32) {
    float most = 0;
    for (size_t i = begin; i < begin + 32; ++i) most = std::fmax(most, std::fabs(x[i]));
    for (size_t i = begin; i < begin + 32; ++i) {
      out[i] = std::nearbyintf(x[i] * (127.0f / most)) * (most / 127.0f);
    }
  }
  return out;
}

// Products that round activations, against exact products of activations that were rounded before.
template <class T>
void compare_rounded(const Set& set, const std::string& dtype, Call call) {
  use(set);
  if (!set.linear_rounds(dtype_of<T>(), call.format, call.tokens)) return;
  const uint64_t seed = uint64_t(call.tokens);
  call.exact = false;
  Data<T, T> data(seed);
  const auto x = data.normal(call.tokens * call.inputs);
  const Floats actual = multiply(data, call, x);
  const Floats rounded = rounded_to_bytes(widened(x));
  Data<T, float> same(seed), again(seed);
  same.normal(call.tokens * call.inputs);  // draws the numbers of x, so that the weights follow
  again.normal(call.tokens * call.inputs);
  use(kScalar);
  Floats plain = multiply(same, call, rounded);
  for (float& value : plain) value = rounded_to<T>(value);
  const Floats exact = multiply_in_doubles(again, call, rounded);
  expect_close<T>(label_of(call, dtype), actual, plain, exact);
}

// Up to 8 tokens get the same bits alone and together.
template <class T>
void compare_alone(const Set& set, const std::string& dtype, Call call) {
  use(set);
  for (bool exact : {true, false}) {
    call.exact = exact;
    call.tokens = 7;
    Data<T, T> data(1);
    const auto x = data.normal(call.tokens * call.inputs);
    Data<T, T> weights(2), same(2);
    const Floats together = multiply(weights, call, x);
    call.tokens = 1;
    const auto from = x.begin() + 3 * call.inputs;
    const Floats alone = multiply(same, call, std::vector<T>(from, from + call.inputs));
    const size_t row = alone.size() * sizeof(float);
    const bool equal = memcmp(together.data() + 3 * alone.size(), alone.data(), row) == 0;
    report(label_of(call, dtype) + ", alone", equal, "the bits differ from those of 7 tokens");
  }
}

// A token that is not finite makes its own outputs NaN, and no others.
template <class T>
void compare_not_finite(const Set& set, const std::string& dtype, Call call) {
  for (bool exact : {true, false}) {
    call.exact = exact;
    Data<T, T> data(1);
    auto x = data.normal(call.tokens * call.inputs);
    from_float(NAN, &x[static_cast<size_t>(call.inputs + 5)]);
    use(set);
    const Floats actual = multiply(data, call, x);
    const size_t row = actual.size() / static_cast<size_t>(call.tokens);
    int wrong = 0;
    for (size_t i = 0; i < actual.size(); ++i) wrong += std::isnan(actual[i]) != (i / row == 1);
    report(label_of(call, dtype) + ", NaN", wrong == 0, std::to_string(wrong) + " outputs");
  }
}

// Sets of aarch64 that differ in how products of integers are added, which gives the same bits.
// neon_i8mm has all other products from neon_bf16, so all of its products have the same bits.
struct SameBits {
  const char *name, *other;
  bool all;  // or products that round activations
};
constexpr SameBits kSameBits[] = {{"neon_dotprod", "neon", false},
                                  {"neon_i8mm", "neon_bf16", true}};

template <class T>
void compare_bits(const SameBits& sets, const std::string& dtype, Call call) {
  const Set both[2] = {set_of(sets.name), set_of(sets.other)};
  for (bool exact : {true, false}) {
    call.exact = exact;
    use(both[0]);
    if (exact ? !sets.all : !both[0].linear_rounds(dtype_of<T>(), call.format, call.tokens)) {
      continue;
    }
    Floats results[2];
    for (int i = 0; i < 2; ++i) {
      use(both[i]);
      Data<T, T> data(uint64_t(call.tokens) + 3);
      const auto x = data.normal(call.tokens * call.inputs);
      results[i] = multiply(data, call, x);
    }
    const size_t bytes = results[0].size() * sizeof(float);
    const bool equal = memcmp(results[0].data(), results[1].data(), bytes) == 0;
    report(label_of(call, dtype), equal,
           std::string("the bits differ from those of ") + sets.other);
  }
  use(kScalar);  // `both` ends here
}

template <class T>
void compare_format(const Set& set, const std::string& dtype, WeightFormat format, int64_t group) {
  const auto call = [&](int64_t tokens, int64_t inputs, int64_t rows) {
    return Call{format, group, tokens, inputs_of(format, group, inputs), rows};
  };
  for (const Call& shape : {call(1, 1, 1), call(2, 331, 9), call(4, 70, 3), call(7, 1100, 5),
                            call(9, 331, 17), call(18, 288, 15)}) {
    compare_exact<T>(set, dtype, shape);
    compare_rounded<T>(set, dtype, shape);
  }
  for (Epilogue epilogue : {Epilogue::add, Epilogue::swiglu}) {
    for (int64_t tokens : {3, 18}) {
      Call fused = call(tokens, 200, 13);
      fused.epilogue = epilogue;
      compare_exact<T>(set, dtype, fused);
      fused.norm = true;
      compare_exact<T>(set, dtype, fused);
    }
  }
  for (const SameBits& sets : kSameBits) {
    if (set.name != sets.name) continue;
    for (const Call& shape : {call(1, 331, 5), call(2, 600, 19), call(5, 1100, 3), call(8, 288, 34),
                              call(9, 331, 17), call(27, 2336, 18)}) {
      compare_bits<T>(sets, dtype, shape);
    }
  }
  compare_largest<T>(set, dtype, call(1, 200, 5));
  compare_largest<T>(set, dtype, call(4, 200, 5));
  compare_alone<T>(set, dtype, call(7, 600, 19));
  compare_not_finite<T>(set, dtype, call(3, 300, 11));
  compare_not_finite<T>(set, dtype, call(21, 300, 11));
}

template <class T>
void compare_backward(const Set& set, const std::string& dtype, WeightFormat format,
                      int64_t group) {
  const int64_t tokens = 21, inputs = inputs_of(format, group, 150), rows = 71;
  const std::string label = std::string("linear_backward, ") + info(format).name + ", " + dtype;
  compare<T>(set, label, 5, [&](auto data) -> std::vector<Floats> {
    auto first = random_weight(data, format, rows, inputs, group);
    auto second = random_weight(data, format, 1, inputs, group);
    const auto d_out = data.normal(tokens * (rows + 1));
    auto d_x = data.normal(tokens * inputs);
    LinearBackwardParams p{};
    p.dtype = data.kType;
    p.d_out = d_out.data();
    p.d_x = d_x.data();
    p.parts[0] = first.part;
    p.parts[1] = second.part;
    p.num_parts = 2;
    p.tokens = tokens;
    p.inputs = p.stride_d_x_token = inputs;
    p.stride_d_out_token = rows + 1;
    Scratch scratch(cpu::linear_backward_scratch_bytes(p));
    p.scratch = scratch.begin();
    cpu::linear_backward(p, kThreads);
    return {widened(d_x)};
  });
}

void compare_argmax(const Set& set) {
  for (int64_t tokens : {3, 12}) {
    std::vector<int64_t> ids[2];
    for (const Set* which : {&set, &kScalar}) {
      use(*which);
      Data<bf16, bf16> data(4);
      const auto x = data.normal(tokens * 64);
      auto weight = random_weight(data, WeightFormat::plain, 300, 64, 0);
      std::vector<bf16> out(static_cast<size_t>(tokens * 300));
      std::vector<int64_t> chosen(static_cast<size_t>(tokens));
      LinearParams p{};
      p.dtype = DType::bf16;
      p.epilogue = Epilogue::argmax;
      p.x = x.data();
      p.out = out.data();
      p.parts[0] = weight.part;
      p.num_parts = 1;
      p.tokens = tokens;
      p.inputs = p.stride_x_token = 64;
      p.stride_out_token = 300;
      p.token_ids = chosen.data();
      p.limit = 290;
      Scratch scratch(in_use().linear_scratch_bytes(p));
      p.scratch = scratch.begin();
      in_use().linear(p, kThreads);
      ids[which == &kScalar] = chosen;
    }
    report("linear with argmax", ids[0] == ids[1], "other tokens");
  }
}

}  // namespace

void compare_linear(const Set& set) {
  for_each_format([&](WeightFormat format, int64_t group) {
    for_each_dtype([&](auto type, const std::string& dtype) {
      compare_format<decltype(type)>(set, dtype, format, group);
      if (!set.linear_alone) compare_backward<decltype(type)>(set, dtype, format, group);
    });
  });
  // Several blocks in every direction.
  for (WeightFormat format : {WeightFormat::plain, WeightFormat::q4_0}) {
    compare_exact<bf16>(set, "bf16", {format, 32, 35, 608, 101});
    compare_rounded<bf16>(set, "bf16", {format, 32, 35, 608, 101});
  }
  compare_argmax(set);
}

}  // namespace mistral::comparison

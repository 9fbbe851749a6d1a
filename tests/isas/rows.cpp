// The ops whose tasks are rows: norms, rotations, SwiGLU, cross entropy, and their gradients; and
// embeddings.
#include <cstring>

#include "weights.h"

namespace mistral::comparison {
namespace {

template <class T>
void compare_norms(const Set& set, const std::string& dtype, int64_t tokens, int64_t dim) {
  for (bool residual : {false, true}) {
    compare<T>(set, "rms_norm, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
      auto x = data.normal(tokens * dim), weight = data.normal(dim);
      auto sum = data.normal(tokens * dim), out = x;
      RmsNormParams p{};
      p.dtype = data.kType;
      p.x = x.data();
      p.weight = weight.data();
      p.residual = residual ? sum.data() : nullptr;
      p.out = out.data();
      p.tokens = tokens;
      p.dim = p.stride_x_token = p.stride_residual_token = p.stride_out_token = dim;
      p.eps = 1e-5f;
      cpu::rms_norm(p, kThreads);
      return {widened(out), widened(sum)};
    });
  }
  if (dim == 1) return;  // the gradient is the difference of equal numbers
  compare<T>(set, "rms_norm_backward, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
    auto x = data.normal(tokens * dim), weight = data.normal(dim),
         d_out = data.normal(tokens * dim);
    auto d_x = x;
    RmsNormBackwardParams p{};
    p.dtype = data.kType;
    p.x = x.data();
    p.weight = weight.data();
    p.d_out = d_out.data();
    p.d_x = d_x.data();
    p.tokens = tokens;
    p.dim = p.stride_x_token = p.stride_d_out_token = p.stride_d_x_token = dim;
    p.eps = 1e-5f;
    cpu::rms_norm_backward(p, kThreads);
    return {widened(d_x)};
  });
}

template <class T>
void compare_swiglu(const Set& set, const std::string& dtype, int64_t tokens, int64_t dim) {
  compare<T>(set, "swiglu, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
    auto gate = data.normal(tokens * dim, 4.0f), up = data.normal(tokens * dim), out = up;
    SwigluParams p{};
    p.dtype = data.kType;
    p.gate = gate.data();
    p.up = up.data();
    p.out = out.data();
    p.tokens = tokens;
    p.dim = p.stride_gate_token = p.stride_up_token = p.stride_out_token = dim;
    cpu::swiglu(p, kThreads);
    return {widened(out)};
  });
  compare<T>(set, "swiglu_backward, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
    auto gate = data.normal(tokens * dim, 4.0f), up = data.normal(tokens * dim);
    auto d_out = data.normal(tokens * dim), d_gate = up, d_up = up;
    SwigluBackwardParams p{};
    p.dtype = data.kType;
    p.gate = gate.data();
    p.up = up.data();
    p.d_out = d_out.data();
    p.d_gate = d_gate.data();
    p.d_up = d_up.data();
    p.tokens = tokens;
    p.dim = p.stride_gate_token = p.stride_up_token = p.stride_d_out_token = dim;
    p.stride_d_gate_token = p.stride_d_up_token = dim;
    cpu::swiglu_backward(p, kThreads);
    return {widened(d_gate), widened(d_up)};
  });
}

template <class T>
void compare_cross_entropy(const Set& set, const std::string& dtype, int64_t tokens,
                           int64_t vocab) {
  compare<T>(set, "cross_entropy, " + dtype, vocab, [&](auto data) -> std::vector<Floats> {
    auto logits = data.normal(tokens * vocab, 3.0f);
    const Floats factors = data.floats(tokens);
    std::vector<int64_t> targets;
    for (int64_t i = 0; i < tokens; ++i) targets.push_back(data.integer(vocab));
    Floats loss(tokens);
    CrossEntropyParams p{};
    p.dtype = data.kType;
    p.logits = logits.data();
    p.targets = targets.data();
    p.factors = factors.data();
    p.loss = loss.data();
    p.tokens = tokens;
    p.vocab = p.stride_logits_token = vocab;
    cpu::cross_entropy(p, kThreads);
    return {loss, widened(logits)};
  });
}

template <class T>
void compare_rotations(const Set& set, const std::string& dtype, int64_t dim) {
  constexpr int64_t kHeads = 3, kKvHeads = 1, kRing = 16;
  // A decode step that has wrapped, and a chunk.
  const Sequence sequences[] = {{0, 1, 40, 0, kRing}, {1, 6, 3, kKvHeads * kRing, kRing}};
  constexpr int64_t kTokens = 7;
  std::vector<double> frequencies;
  for (int64_t i = 0; i < dim / 2; ++i) frequencies.push_back(pow(1e4, -2.0 * double(i) / dim));
  for (bool backward : {false, true}) {
    compare<T>(set, "rotate, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
      auto x = data.normal(kTokens * kHeads * dim), out = x;
      RotateParams p{};
      p.dtype = data.kType;
      p.x = x.data();
      p.out = out.data();
      p.sequences = sequences;
      p.frequencies = frequencies.data();
      p.num_sequences = 2;
      p.tokens = kTokens;
      p.heads = kHeads;
      p.head_dim = p.stride_x_head = p.stride_out_head = dim;
      p.stride_x_token = p.stride_out_token = kHeads * dim;
      p.backward = backward;
      cpu::rotate(p, kThreads);
      return {widened(out)};
    });
  }
  compare<T>(set, "rope, " + dtype, dim, [&](auto data) -> std::vector<Floats> {
    auto q = data.normal(kTokens * kHeads * dim), k = data.normal(kTokens * kKvHeads * dim);
    auto v = data.normal(kTokens * kKvHeads * dim);
    auto k_pool = data.normal(2 * kKvHeads * kRing * dim), v_pool = k_pool;
    RopeParams p{};
    p.dtype = data.kType;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.k_pool = k_pool.data();
    p.v_pool = v_pool.data();
    p.sequences = sequences;
    p.frequencies = frequencies.data();
    p.num_sequences = 2;
    p.tokens = kTokens;
    p.heads = kHeads;
    p.kv_heads = kKvHeads;
    p.head_dim = p.stride_q_head = p.stride_k_head = p.stride_v_head = dim;
    p.stride_q_token = kHeads * dim;
    p.stride_k_token = p.stride_v_token = kKvHeads * dim;
    p.window = kRing;
    cpu::rope(p, kThreads);
    return {widened(q), widened(k), widened(k_pool), widened(v_pool)};
  });
}

// Rows of weights of every format. `inputs` is rounded up to what the format takes.
template <class T>
void compare_embeddings(const Set& set, const std::string& dtype, int64_t inputs) {
  constexpr int64_t kRows = 4;
  const int64_t ids[] = {3, 0, 3, 1};
  for_each_format([&](WeightFormat format, int64_t group) {
    const int64_t dim = inputs_of(format, group, inputs);
    const std::string label = std::string("embedding, ") + info(format).name + " of " +
                              std::to_string(group) + ", " + dtype + ", E " + std::to_string(dim);
    compare<T>(set, label, dim, [&](auto data) -> std::vector<Floats> {
      const auto weight = random_weight(data, format, kRows, dim, group);
      auto out = data.normal(std::size(ids) * dim);
      EmbeddingParams p{};
      p.dtype = data.kType;
      p.token_ids = ids;
      p.weight = weight.part;
      p.out = out.data();
      p.tokens = std::size(ids);
      p.dim = dim;
      cpu::embedding(p, kThreads);
      return {widened(out)};
    });
  });
}

// x + -0 is x to the bit, for every x of 16 bits: rms_norm loads and stores it as the residual.
template <class T>
void compare_every_value(const Set& set, const std::string& dtype) {
  constexpr int64_t kDim = 1 << 16;
  std::vector<T> residual(kDim), out(kDim);
  const std::vector<T> zeros(kDim, T{0x8000});
  for (int64_t i = 0; i < kDim; ++i) residual[i].bits = static_cast<uint16_t>(i);
  RmsNormParams p{};
  p.dtype = dtype_of<T>();
  p.x = p.weight = zeros.data();
  p.residual = residual.data();
  p.out = out.data();
  p.tokens = 1;
  p.dim = kDim;
  use(set);
  cpu::rms_norm(p, kThreads);
  int64_t wrong = 0;
  for (int64_t i = 0; i < kDim; ++i) {
    const T before{static_cast<uint16_t>(i)};
    const bool nan = to_float(before) != to_float(before);
    wrong += nan ? to_float(residual[i]) == to_float(residual[i]) : residual[i].bits != before.bits;
  }
  report("every value, " + dtype, wrong == 0, std::to_string(wrong) + " changed");
}

}  // namespace

void compare_rows(const Set& set) {
  for_each_dtype([&](auto type, const std::string& dtype) {
    using T = decltype(type);
    for (int64_t dim : {1, 3, 7, 70, 1027}) {
      compare_norms<T>(set, dtype, 5, dim);
      compare_swiglu<T>(set, dtype, 5, dim);
      compare_cross_entropy<T>(set, dtype, 5, dim);
      compare_embeddings<T>(set, dtype, dim);
    }
    for (int64_t dim : {32, 128}) compare_rotations<T>(set, dtype, dim);
  });
  compare_every_value<bf16>(set, "bf16");
  compare_every_value<f16>(set, "fp16");
}

}  // namespace mistral::comparison

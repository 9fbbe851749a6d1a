// Attention over rings, and its gradients.
#include "compare.h"

namespace mistral::comparison {
namespace {

struct Shape {
  int64_t heads, kv_heads, dim, window;
};

// New tokens of a sequence.
struct Chunk {
  int64_t count, position, capacity;
};

std::vector<Sequence> sequences_of(const std::vector<Chunk>& chunks, int64_t kv_heads) {
  std::vector<Sequence> out;
  int64_t first = 0, row = 0;
  for (const Chunk& chunk : chunks) {
    out.push_back({first, chunk.count, chunk.position, row, chunk.capacity});
    first += chunk.count;
    row += chunk.capacity * kv_heads;
  }
  return out;
}

template <class Data>
struct Forward {
  using T = typename Data::Type;
  std::vector<T> q, k, v, k_pool, v_pool, out;
  Floats lse, partials;
  AttentionParams p{};

  Forward(Data& data, const Shape& shape, const std::vector<Sequence>& sequences, bool with_lse) {
    const int64_t tokens = sequences.back().first_token + sequences.back().count;
    const int64_t rows = sequences.back().ring_row + sequences.back().capacity * shape.kv_heads;
    q = data.normal(tokens * shape.heads * shape.dim, 2.0f);
    k = data.normal(tokens * shape.kv_heads * shape.dim);
    v = data.normal(tokens * shape.kv_heads * shape.dim);
    k_pool = data.normal(rows * shape.dim);
    v_pool = data.normal(rows * shape.dim);
    out.resize(q.size());
    lse.resize(static_cast<size_t>(tokens * shape.heads));
    p.dtype = Data::kType;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.k_pool = k_pool.data();
    p.v_pool = v_pool.data();
    p.out = out.data();
    p.lse = with_lse ? lse.data() : nullptr;
    p.sequences = sequences.data();
    p.num_sequences = int64_t(sequences.size());
    p.pool_rows = rows;
    p.tokens = tokens;
    p.heads = shape.heads;
    p.kv_heads = shape.kv_heads;
    p.head_dim = p.stride_q_head = p.stride_k_head = p.stride_v_head = p.stride_out_head =
        shape.dim;
    p.stride_q_token = p.stride_out_token = shape.heads * shape.dim;
    p.stride_k_token = p.stride_v_token = shape.kv_heads * shape.dim;
    p.window = shape.window;
    p.scale = 1.0f / std::sqrt(float(shape.dim));
    partials.resize(static_cast<size_t>(cpu::attention_scratch_bytes(p)) / sizeof(float) + 1);
    p.partials = partials.data();
    cpu::attention(p, kThreads);
  }
};

template <class T>
void compare_shape(const Set& set, const std::string& dtype, const Shape& shape) {
  const std::string label = dtype + ", D " + std::to_string(shape.dim);
  // Decode steps, with the first shape over two segments, and one that has wrapped; a chunk; an
  // idle sequence.
  const int64_t ring = shape.window;
  const auto ragged = sequences_of(
      {{1, ring - 9, ring}, {1, 2 * ring, ring}, {37, 21, 100}, {0, 9, 20}, {2, 130, 140}},
      shape.kv_heads);
  compare<T>(set, "attention, " + label, 1, [&](auto data) -> std::vector<Floats> {
    Forward<decltype(data)> forward(data, shape, ragged, false);
    return {widened(forward.out), widened(forward.k_pool), widened(forward.v_pool)};
  });
  const auto prompts = sequences_of({{1, 0, 80}, {45, 0, 80}, {70, 0, 80}}, shape.kv_heads);
  compare<T>(set, "attention of prompts, " + label, 2, [&](auto data) -> std::vector<Floats> {
    Forward<decltype(data)> forward(data, shape, prompts, true);
    return {widened(forward.out), forward.lse};
  });
  compare<T>(set, "attention_backward, " + label, 3, [&](auto data) -> std::vector<Floats> {
    Forward<decltype(data)> forward(data, shape, prompts, true);
    const auto d_out = data.normal(int64_t(forward.out.size()));
    auto d_q = forward.q, d_k = forward.k, d_v = forward.v;
    AttentionBackwardParams p{};
    p.dtype = data.kType;
    p.q = forward.q.data();
    p.k = forward.k.data();
    p.v = forward.v.data();
    p.out = forward.out.data();
    p.d_out = d_out.data();
    p.lse = forward.lse.data();
    p.d_q = d_q.data();
    p.d_k = d_k.data();
    p.d_v = d_v.data();
    p.sequences = prompts.data();
    p.num_sequences = int64_t(prompts.size());
    p.tokens = forward.p.tokens;
    p.heads = shape.heads;
    p.kv_heads = shape.kv_heads;
    p.head_dim = shape.dim;
    p.stride_q_token = forward.p.stride_q_token;
    p.stride_q_head = p.stride_k_head = p.stride_v_head = shape.dim;
    p.stride_k_token = p.stride_v_token = forward.p.stride_k_token;
    p.window = shape.window;
    p.scale = forward.p.scale;
    Floats delta(static_cast<size_t>(attention_backward_scratch_bytes(p)) / sizeof(float) + 1);
    p.delta = delta.data();
    cpu::attention_backward(p, kThreads);
    return {widened(d_q), widened(d_k), widened(d_v)};
  });
}

}  // namespace

void compare_attention(const Set& set) {
  for_each_dtype([&](auto type, const std::string& dtype) {
    using T = decltype(type);
    compare_shape<T>(set, dtype, {6, 2, 96, 1100});
    compare_shape<T>(set, dtype, {3, 3, 32, 33});
  });
}

}  // namespace mistral::comparison

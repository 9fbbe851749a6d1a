// Computes hidden = scale * (x A^T) and out += hidden B (lora.h), each in a loop over tasks. In the
// first loop, a task multiplies a block of tokens by a few rows of A. In the second loop, a task
// multiplies a block of tokens of `hidden` by B, for a block of outputs. Two neighbouring tokens
// with the same adapter are computed together, so that they share the loads of A and B. The
// additions of an output keep their order, so its bits do not depend on the neighbour.
#include "../lora.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int64_t kTaskTokens = 8;
constexpr int64_t kTaskRows = 4;  // with 2 tokens: 8 running sums, which fit in registers
constexpr int64_t kTaskOutputs = 1024;
constexpr int64_t kTileTokens = 2;
constexpr int64_t kTileVectors = 4;
// The number of vectors that are summed before the sum is added to the total. One running sum over
// thousands of values would lose digits, most of all on the scalar set, where one lane takes all of
// them.
constexpr int64_t kVectorsPerSum = 32;

template <int64_t kCount>
struct Count {
  static constexpr int64_t value = kCount;
};

int64_t rank_of(const LoraParams& p, int64_t adapter, int64_t part) {
  return p.ranks[adapter * p.num_parts + part];
}

// Calls f(token, count, adapter) for all tokens of a block that have an adapter. A call is for
// `count` neighbouring tokens from `token` on, which have the same adapter. `count` is at most
// kTileTokens.
template <class F>
void for_each_tile(const LoraParams& p, int64_t block, const F& f) {
  const int64_t end = mistral::min((block + 1) * kTaskTokens, p.tokens);
  for (int64_t token = block * kTaskTokens; token < end;) {
    const int32_t adapter = p.adapters[token];
    int64_t count = 1;
    while (count < kTileTokens && token + count < end && p.adapters[token + count] == adapter) {
      ++count;
    }
    if (adapter >= 0) f(token, count, int64_t{adapter});
    token += count;
  }
}

// out[row * kTokens + t] = the dot product of a[row] and token t of x.
template <int64_t kRows, int64_t kTokens, class T>
void multiply(const T* a, const T* x, int64_t stride_x, int64_t dim, float* out) {
  Vec sums[kRows][kTokens];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = broadcast(0.0f);
  }
  const auto add_to = [&](Vec(&to)[kRows][kTokens], int64_t i, const auto& load_at) {
    Vec inputs[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) inputs[t] = load_at(x + t * stride_x + i);
    for (int64_t row = 0; row < kRows; ++row) {
      const Vec weights = load_at(a + row * dim + i);
      for (int64_t t = 0; t < kTokens; ++t) to[row][t] = fma(weights, inputs[t], to[row][t]);
    }
  };
  int64_t i = 0;
  while (i + Vec::width <= dim) {
    const int64_t end = mistral::min(i + kVectorsPerSum * Vec::width, dim);
    Vec part[kRows][kTokens];
    for (auto& row : part) {
      for (Vec& sum : row) sum = broadcast(0.0f);
    }
    for (; i + Vec::width <= end; i += Vec::width) {
      add_to(part, i, [](const T* p) { return load(p); });
    }
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t t = 0; t < kTokens; ++t) sums[row][t] = sums[row][t] + part[row][t];
    }
  }
  if (i < dim) {
    add_to(sums, i, [&](const T* p) { return load_first(p, dim - i); });
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t t = 0; t < kTokens; ++t) out[row * kTokens + t] = sum(sums[row][t]);
  }
}

// Writes the scaled products of kTokens tokens with rows [first, first + kRows) of A to p.hidden,
// for one part: one of the layers that share x (lora.h). The tokens have the same adapter.
template <class T, int64_t kRows, int64_t kTokens>
void shrink(const LoraParams& p, int64_t token, int64_t adapter, int64_t part, int64_t first) {
  const int64_t row = part * p.max_rank + first, rows = p.num_parts * p.max_rank;
  float products[kRows * kTokens];
  multiply<kRows, kTokens>(static_cast<const T*>(p.a) + (adapter * rows + row) * p.inputs,
                           static_cast<const T*>(p.x) + token * p.stride_x_token, p.stride_x_token,
                           p.inputs, products);
  const float scale = p.scales[adapter * p.num_parts + part];
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < kRows; ++i) {
      p.hidden[(token + t) * rows + row + i] = scale * products[i * kTokens + t];
    }
  }
}

template <class T, int64_t kTokens>
void shrink_rows(const LoraParams& p, int64_t token, int64_t adapter, int64_t part, int64_t first) {
  const int64_t end = mistral::min(first + kTaskRows, rank_of(p, adapter, part));
  if (first + kTaskRows == end)
    return shrink<T, kTaskRows, kTokens>(p, token, adapter, part, first);
  for (int64_t row = first; row < end; ++row) {
    shrink<T, 1, kTokens>(p, token, adapter, part, row);
  }
}

// Multiplies `hidden` by B and adds the products to outputs [begin, end) of one part, for kTokens
// tokens with the same adapter.
template <class T, class Out, int64_t kTokens>
void expand(const LoraParams& p, int64_t token, int64_t adapter, int64_t part, int64_t begin,
            int64_t end) {
  const int64_t rank = rank_of(p, adapter, part), rows = p.num_parts * p.max_rank;
  if (rank == 0) return;
  const T* b = static_cast<const T*>(p.b) + adapter * p.max_rank * p.outputs;
  const float* hidden = p.hidden + token * rows + part * p.max_rank;
  Out* out = static_cast<Out*>(p.out) + token * p.stride_out_token;
  const auto add_vectors = [&](auto vectors, int64_t n, const auto& load_at, const auto& store_at) {
    constexpr int64_t kVectors = decltype(vectors)::value;
    Vec sums[kTokens][kVectors];
    for (auto& of_token : sums) {
      for (Vec& sum : of_token) sum = broadcast(0.0f);
    }
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vec weights = load_at(b + r * p.outputs + n + v * Vec::width);
        for (int64_t t = 0; t < kTokens; ++t) {
          sums[t][v] = fma(broadcast(hidden[t * rows + r]), weights, sums[t][v]);
        }
      }
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t v = 0; v < kVectors; ++v) {
        Out* to = out + t * p.stride_out_token + n + v * Vec::width;
        store_at(to, load_at(to) + sums[t][v]);
      }
    }
  };
  const auto load_whole = [](const auto* from) { return load(from); };
  const auto store_whole = [](Out* to, Vec x) { store(to, x); };
  int64_t n = begin;
  for (; n + kTileVectors * Vec::width <= end; n += kTileVectors * Vec::width) {
    add_vectors(Count<kTileVectors>{}, n, load_whole, store_whole);
  }
  for (; n + Vec::width <= end; n += Vec::width) {
    add_vectors(Count<1>{}, n, load_whole, store_whole);
  }
  if (n < end) {
    add_vectors(
        Count<1>{}, n, [&](const auto* from) { return load_first(from, end - n); },
        [&](Out* to, Vec x) { store_first(to, x, end - n); });
  }
}

template <class T, class Out>
void run(const LoraParams& p, int threads) {
  const int64_t blocks = ceil_div(p.tokens, kTaskTokens);
  const int64_t row_blocks = ceil_div(p.max_rank, kTaskRows);
  parallel_for(threads, blocks * p.num_parts * row_blocks, [&](int64_t task) {
    const int64_t first = task % row_blocks * kTaskRows;
    const int64_t part = task / row_blocks % p.num_parts;
    for_each_tile(p, task / row_blocks / p.num_parts, [&](int64_t token, int64_t count, int64_t i) {
      if (count == kTileTokens) return shrink_rows<T, kTileTokens>(p, token, i, part, first);
      shrink_rows<T, 1>(p, token, i, part, first);
    });
  });

  int64_t output_blocks = 0;
  for (int64_t part = 0; part < p.num_parts; ++part) {
    output_blocks += ceil_div(p.part_outputs[part], kTaskOutputs);
  }
  parallel_for(threads, blocks * output_blocks, [&](int64_t task) {
    int64_t block = task % output_blocks, part = 0, column = 0;
    while (block >= ceil_div(p.part_outputs[part], kTaskOutputs)) {
      block -= ceil_div(p.part_outputs[part], kTaskOutputs);
      column += p.part_outputs[part++];
    }
    const int64_t begin = column + block * kTaskOutputs;
    const int64_t end = mistral::min(begin + kTaskOutputs, column + p.part_outputs[part]);
    for_each_tile(p, task / output_blocks, [&](int64_t token, int64_t count, int64_t i) {
      if (count == kTileTokens) return expand<T, Out, kTileTokens>(p, token, i, part, begin, end);
      expand<T, Out, 1>(p, token, i, part, begin, end);
    });
  });
}

}  // namespace

void lora(const LoraParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.out_dtype == p.dtype) {
      run<T, T>(p, threads);
    } else {
      run<T, float>(p, threads);
    }
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA

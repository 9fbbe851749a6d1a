// Low-rank adapters, and their gradients.
#include "compare.h"

namespace mistral::comparison {
namespace {

template <class T>
void compare_adapters(const Set& set, const std::string& dtype, int64_t inputs) {
  constexpr int64_t kAdapters = 2, kParts = 2, kMaxRank = 6, kTokens = 19;
  constexpr int64_t kPartOutputs[kParts] = {1, 1042};
  constexpr int64_t kOutputs = kPartOutputs[0] + kPartOutputs[1];
  const int32_t ranks[kAdapters * kParts] = {6, 1, 5, 0};
  std::vector<int32_t> adapters;
  for (int32_t i = 0; i < kTokens; ++i) adapters.push_back(i / 3 % 3 - 1);
  compare<T>(set, "lora, " + dtype, inputs, [&](auto data) -> std::vector<Floats> {
    const auto x = data.normal(kTokens * inputs);
    const auto a = data.normal(kAdapters * kParts * kMaxRank * inputs);
    const auto b = data.normal(kAdapters * kMaxRank * kOutputs);
    auto out = data.normal(kTokens * kOutputs);
    const Floats scales = data.floats(kAdapters * kParts);
    Floats hidden(kTokens * kParts * kMaxRank);
    LoraParams p{};
    p.dtype = p.out_dtype = data.kType;
    p.x = x.data();
    p.a = a.data();
    p.b = b.data();
    p.scales = scales.data();
    p.ranks = ranks;
    p.adapters = adapters.data();
    p.hidden = hidden.data();
    p.out = out.data();
    for (int64_t i = 0; i < kParts; ++i) p.part_outputs[i] = kPartOutputs[i];
    p.num_parts = kParts;
    p.tokens = kTokens;
    p.inputs = p.stride_x_token = inputs;
    p.outputs = p.stride_out_token = kOutputs;
    p.max_rank = kMaxRank;
    cpu::lora(p, kThreads);
    return {widened(out)};
  });
  compare<T>(set, "lora_gradient, " + dtype, inputs, [&](auto data) -> std::vector<Floats> {
    const auto x = data.normal(kTokens * inputs);
    const Floats hidden = data.floats(kTokens * kMaxRank);
    Floats out(static_cast<size_t>(kAdapters * kMaxRank * inputs));
    LoraGradientParams p{};
    p.dtype = data.kType;
    p.hidden = hidden.data();
    p.x = x.data();
    p.adapters = adapters.data();
    p.out = out.data();
    p.tokens = kTokens;
    p.rank = p.stride_hidden_token = kMaxRank;
    p.columns = p.stride_x_token = inputs;
    p.num_adapters = kAdapters;
    cpu::lora_gradient(p, kThreads);
    return {out};
  });
}

}  // namespace

void compare_lora(const Set& set) {
  for_each_dtype([&](auto type, const std::string& dtype) {
    for (int64_t inputs : {3, 70, 530}) compare_adapters<decltype(type)>(set, dtype, inputs);
  });
}

}  // namespace mistral::comparison

// `sample` must choose the tokens that it chooses on x86. One kernel draws for all sets. Each set
// has a kernel for greedy choices.
#include "compare.h"

namespace mistral::comparison {

void compare_sample(const Set& set) {
  use(set);
  constexpr int64_t kRows = 6, kVocab = 1003;
  // Temperature, top_k, top_p, min_p, and penalties.
  const SamplingOptions options[kRows] = {
      {0, 0, 1, 0, 1, 0, 0},       {1, 0, 1, 0, 1, 0, 0},      {0.7, 50, 1, 0, 1, 0, 0},
      {1.3, 0, 0.9, 0, 1.2, 0, 0}, {1, 0, 1, 0.05, 1, 1, 0.5}, {2, 300, 0.95, 0.01, 1, 0, 0}};
  Data<float, float> data(7);
  Floats logits;
  for (int64_t i = 0; i < kRows * kVocab; ++i) {
    logits.push_back(static_cast<float>(data.integer(4096)) / 512);  // the same on every machine
  }
  std::vector<int32_t> history;
  for (int64_t i = 0; i < kRows * kVocab; ++i) history.push_back(int32_t(data.integer(4)));
  NoiseState noise[kRows];
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < kRows; ++i) {
    noise[i] = {uint64_t(40 + i), uint64_t(i), 3 * i};
    rows.push_back(i);
  }
  std::vector<uint32_t> keys(kRows * kVocab);
  std::vector<uint64_t> weights(kRows * kVocab);
  std::vector<int64_t> chosen(kRows);
  SampleParams p{};
  p.logits = logits.data();
  p.rows = rows.data();
  p.options = options;
  p.noise = noise;
  p.history = history.data();
  p.token_ids = chosen.data();
  p.keys = keys.data();
  p.weights = weights.data();
  p.num_rows = kRows;
  p.vocab_size = p.stride_logits_row = kVocab;
  cpu::sample(p, kThreads);
  std::string tokens;
  for (int64_t token : chosen) tokens += std::to_string(token) + " ";
  report("sample", tokens == "215 230 985 904 729 407 ", "chose " + tokens);
}

}  // namespace mistral::comparison

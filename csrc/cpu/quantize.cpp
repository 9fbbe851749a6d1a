// Rounds weights to iq4_nl and iq4_xs (quantize.h). A task rounds one row.
//
// For each 32 weights x a few scales are tried. Rounding with a tried scale gives elements t of
// kTable4. The scale that suits these t best is sum(v x t) / sum(v t t), where v is how much the
// squared error of each weight counts. It leaves the error sum(v x x) - sum(v x t)^2 / sum(v t t).
// Of the scales found in this way, the one with the least error is taken.
#include "../quantize.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/simd.h"
#include "simd/table4.h"

namespace mistral::cpu::MISTRAL_ISA {
namespace {

constexpr int kGroups = kSuperBlock / kGroup4;  // the number of groups in a super-block

// The scales that are tried. With ratio r, the weight of largest magnitude, divided by the scale,
// is an end of kTable4 (-127 or 113) divided by r. If r is above 1, the weights do not reach the
// end of the table. If r is below 1, the largest weights are cut off. Each ratio is tried with both
// ends. Twice as many ratios would reduce the error by another 0.3 %.
constexpr float kTried[] = {0.86f, 0.94f, 1.02f, 1.10f};

// 32 weights x, and how much the error of each counts: v.
struct Group {
  alignas(64) float x[kGroup4];
  alignas(64) float v[kGroup4];
  alignas(64) float vx[kGroup4];  // v * x
};

// sum(v x t) and sum(v t t).
struct Sums {
  float vxt, vtt;
};

// The sums for the elements t of kTable4 that are nearest to x * factor.
MISTRAL_SIMD Sums sums_with(const Group& g, float factor) {
  alignas(32) int8_t table[kGroup4];
  nearest_values(g.x, factor, table);
  Vec vxt = broadcast(0.0f), vtt = broadcast(0.0f);
  for (int i = 0; i < kGroup4; i += Vec::width) {
    const Vec t = load(table + i);
    vxt = fma(load(g.vx + i), t, vxt);
    vtt = fma(load(g.v + i) * t, t, vtt);
  }
  return {sum(vxt), sum(vtt)};
}

MISTRAL_SIMD Vec magnitude(Vec x) { return vmax(x, broadcast(0.0f) - x); }

// The largest magnitude of `count` numbers, or NaN if a number is NaN or infinite.
MISTRAL_SIMD float finite_magnitude(const float* x, int count) {
  Vec most = broadcast(0.0f), sum_of_zeros = broadcast(0.0f);
  for (int i = 0; i < count; i += Vec::width) {
    most = vmax(magnitude(load(x + i)), most);
    sum_of_zeros = fma(load(x + i), broadcast(0.0f), sum_of_zeros);  // NaN if x has NaN or infinity
  }
  return largest(most) + sum(sum_of_zeros);
}

// The weight with the largest magnitude. If a positive and a negative weight both have this
// magnitude, it is the positive one.
MISTRAL_SIMD float extreme_of(const Group& g) {
  Vec high = broadcast(0.0f), low = broadcast(0.0f);
  for (int i = 0; i < kGroup4; i += Vec::width) {
    high = vmax(load(g.x + i), high);
    low = vmax(broadcast(0.0f) - load(g.x + i), low);
  }
  return largest(high) >= largest(low) ? largest(high) : -largest(low);
}

float inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Returns the scale of a group with the least error, found as the top of this file describes, or 0
// if all weights are 0.
float best_scale(const Group& g) {
  const float extreme = extreme_of(g);
  if (extreme == 0.0f) return 0.0f;
  float most = 0.0f, best = extreme / kTable4[0];
  const auto consider = [&](float factor) {
    const Sums sums = sums_with(g, factor);
    const float scale = sums.vxt / sums.vtt, gained = sums.vxt * scale;
    // Returns also if `gained` is NaN, as with weights that are far too large for fp16 scales.
    if (!(gained > most)) return;
    most = gained;
    best = scale;
  };
  for (const float tried : kTried) {
    consider(kTable4[0] / (extreme * tried));
    consider(kTable4[15] / (extreme * tried));
  }
  return best;
}

// Writes a scale, rounded to fp16, and returns the rounded scale.
float as_f16(float scale, f16* out) {
  from_float(scale, out);
  return to_float(*out);
}

// The scales of a super-block of iq4_xs. The scale of a group is the scale of the super-block
// multiplied by an integer from -32 to 31, the multiple of the group.
struct TwoLevels {
  f16 scale;
  uint16_t high;             // bits 4 and 5 of (multiple + 32) of each group
  uint8_t low[kGroups / 2];  // bits 0 to 3, two groups in a byte

  void set(int group, int multiple) {
    const unsigned bits = static_cast<unsigned>(multiple + 32);
    high = static_cast<uint16_t>(high | (bits >> 4) << 2 * group);
    low[group / 2] = static_cast<uint8_t>(low[group / 2] | (bits & 15) << 4 * (group % 2));
  }
};
static_assert(sizeof(TwoLevels) == 8, "GGUF's layout");

constexpr int kLeastMultiple = -32, kMostMultiple = 31;

// Writes and returns the scale of a super-block. It is chosen so that the group scale of largest
// magnitude gets the multiple of largest magnitude, -32.
float upper_scale(const float* group_scales, f16* out) {
  float largest = 0.0f;
  for (int i = 0; i < kGroups; ++i) {
    largest = fabsf(group_scales[i]) > fabsf(largest) ? group_scales[i] : largest;
  }
  return as_f16(largest / kLeastMultiple, out);
}

// Returns the multiple of a group that leaves the least error. Tries `middle`, the multiple that
// makes the scale nearest to group_scale, and its two neighbours. 0 is left out, because it would
// make all weights 0. If no multiple leaves less error than weights of 0, or if the sums are not
// finite, returns `middle`.
int best_multiple(const Group& g, float group_scale, float upper) {
  const float nearest = rintf(group_scale * inverse(upper));
  const int middle = static_cast<int>(fminf(fmaxf(nearest, kLeastMultiple), kMostMultiple));
  float most = 0.0f;
  int best = middle;
  for (int multiple = middle - 1; multiple <= middle + 1; ++multiple) {
    if (multiple < kLeastMultiple || multiple > kMostMultiple || multiple == 0) continue;
    const float scale = upper * static_cast<float>(multiple);
    const Sums sums = sums_with(g, inverse(scale));
    const float gained = scale * (2 * sums.vxt - scale * sums.vtt);
    if (!(gained > most)) continue;
    most = gained;
    best = multiple;
  }
  return best;
}

void round_two_levels(const Group* groups, uint32_t* words, TwoLevels* scales) {
  float best[kGroups];
  for (int i = 0; i < kGroups; ++i) best[i] = best_scale(groups[i]);
  *scales = {};
  const float upper = upper_scale(best, &scales->scale);
  for (int i = 0; i < kGroups; ++i) {
    const int multiple = best_multiple(groups[i], best[i], upper);
    scales->set(i, multiple);
    const float scale = upper * static_cast<float>(multiple);
    nearest_words(groups[i].x, inverse(scale), words + i * kGroup4 / 8);
  }
}

void round_group(const Group& g, uint32_t* words, f16* scale) {
  nearest_words(g.x, inverse(as_f16(best_scale(g), scale)), words);
}

// Sets v, how much the error of each weight counts: its magnitude plus `typical`, multiplied by the
// importance of its input. So large weights count more. If `importance` is null, all inputs count
// alike. Returns the error that would remain if all weights became 0.
MISTRAL_SIMD float weigh(Group& g, const float* importance, float typical) {
  Vec error = broadcast(0.0f);
  for (int i = 0; i < kGroup4; i += Vec::width) {
    const Vec x = load(g.x + i);
    Vec v = magnitude(x) + broadcast(typical);
    if (importance) v = v * load(importance + i);
    store(g.v + i, v);
    store(g.vx + i, v * x);
    error = fma(v * x, x, error);
  }
  return sum(error);
}

// Loads `count` neighbouring columns of a row, at most 256 and a multiple of 32, as groups.
template <class T>
MISTRAL_SIMD void load_groups(const T* weight, const float* importance, int count, Group* groups) {
  Vec total = broadcast(0.0f);
  for (int i = 0; i < count; i += Vec::width) {
    const Vec x = load(weight + i);
    store(groups[i / kGroup4].x + i % kGroup4, x);
    total = total + magnitude(x);
  }
  const float mean = sum(total) / static_cast<float>(count);
  for (int i = 0; i < count / kGroup4; ++i) {
    if (importance && weigh(groups[i], importance + i * kGroup4, mean) != 0.0f) continue;
    // Without importances, weights count by their size alone. They also do so if the importances
    // leave this group no error to reduce, for example because all are 0.
    weigh(groups[i], nullptr, mean);
  }
}

template <class T>
void round_row(const QuantizeParams& p, int64_t row) {
  const T* weight = static_cast<const T*>(p.weight) + row * p.stride_weight_row;
  float largest = 0.0f;
  for (int64_t begin = 0; begin < p.inputs; begin += kSuperBlock) {
    const int count = static_cast<int>(mistral::min(kSuperBlock, p.inputs - begin));
    Group groups[kGroups];
    load_groups(weight + begin, p.importance ? p.importance + begin : nullptr, count, groups);
    const int64_t at = row * p.inputs + begin;
    uint32_t* words = p.values + at / 8;
    if (p.two_levels) {
      round_two_levels(groups, words, static_cast<TwoLevels*>(p.scales) + at / kSuperBlock);
    }
    for (int i = 0; i < count / kGroup4; ++i) {
      const float magnitude = finite_magnitude(groups[i].x, kGroup4);
      // If a magnitude is NaN, `largest` becomes NaN and stays NaN.
      if (largest == largest && !(magnitude <= largest)) largest = magnitude;
      if (p.two_levels) continue;
      round_group(groups[i], words + i * kGroup4 / 8,
                  static_cast<f16*>(p.scales) + at / kGroup4 + i);
    }
  }
  p.largest[row] = largest;
}

// Rounds the columns of one group of a row, one after another. To compensate the error of a column,
// all later columns of the row are changed. Row i of p.factor says how much for column i. Column i
// of `row` then holds its error (QuantizeFeedbackParams in quantize.h).
void feed_back(const QuantizeFeedbackParams& p, float* row, int64_t first, float scale,
               uint32_t* words) {
  for (int i = 0; i < kGroup4 / 8; ++i) words[i] = 0;
  for (int64_t i = first; i < first + kGroup4; ++i) {
    const int index = nearest_index(row[i], inverse(scale));
    const int place = static_cast<int>(i - first);
    words[place / 8] |= static_cast<uint32_t>(index) << int4_shift(place % 8);
    const float* follow = p.factor + i * p.stride_factor_row;
    const float error = (row[i] - scale * kTable4[index]) / follow[i];
    // `follow` is 0 before column i, so the loop may begin at a whole vector before i.
    for (int64_t j = i / Vec::width * Vec::width; j < p.columns; j += Vec::width) {
      store(row + j, fma(broadcast(-error), load(follow + j), load(row + j)));
    }
    row[i] = error;
  }
}

void round_row_with_feedback(const QuantizeFeedbackParams& p, int64_t row_index) {
  float* row = p.weight + row_index * p.stride_weight_row;
  uint32_t* words = p.values + row_index * p.stride_values_row;
  char* scales = p.scales + row_index * p.stride_scales_row;
  const int count = static_cast<int>(p.columns);
  Group groups[kGroups];
  TwoLevels levels{};
  float upper = 0.0f;
  if (p.two_levels) {
    float best[kGroups];
    load_groups(row, p.importance, count, groups);
    for (int i = 0; i < kGroups; ++i) best[i] = best_scale(groups[i]);
    upper = upper_scale(best, &levels.scale);
  }
  for (int i = 0; i < count / kGroup4; ++i) {
    const int first = i * kGroup4;
    // The errors of earlier columns have changed these weights, so the scale is chosen only now.
    load_groups(row + first, p.importance ? p.importance + first : nullptr, kGroup4, groups);
    float scale = best_scale(groups[0]);
    if (p.two_levels) {
      const int multiple = best_multiple(groups[0], scale, upper);
      levels.set(i, multiple);
      scale = upper * static_cast<float>(multiple);
    } else {
      scale = as_f16(scale, reinterpret_cast<f16*>(scales) + i);
    }
    feed_back(p, row, first, scale, words + first / 8);
  }
  if (p.two_levels) memcpy(scales, &levels, sizeof levels);
}

}  // namespace

void quantize(const QuantizeParams& p, int threads) {
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, p.rows, [&](int64_t row) { round_row<T>(p, row); });
  });
}

void quantize_feedback(const QuantizeFeedbackParams& p, int threads) {
  parallel_for(threads, p.rows, [&](int64_t row) { round_row_with_feedback(p, row); });
}

}  // namespace mistral::cpu::MISTRAL_ISA

// Chooses and launches the kernels of `attention`.
#include "../../attention.h"

#include <launch.cuh>

#include <cstdlib>
#include <stdexcept>

#include "../common/element.cuh"
#include "../selection.h"
#include "decode.cuh"
#include "prefill_sm80.cuh"
#include "prefill_sm90.h"

namespace mistral::cuda {
namespace {

constexpr bool kHasHopper =
#ifdef MISTRAL_HOPPER
    true;
#else
    false;
#endif

Prefill find_prefill(const std::string& wanted) {
  std::string names;
  for (const Prefill prefill : built_prefills()) {
    if (wanted == name(prefill)) return prefill;
    names += (names.empty() ? "" : ", ") + std::string(name(prefill));
  }
  throw std::invalid_argument("attention kernel is '" + wanted +
                              "', expected one that this build has: " + names);
}

Prefill initial_prefill() {
  const char* wanted = std::getenv("MISTRAL_EXT_ATTENTION");
  if (!wanted || !*wanted) return Prefill::sm80;
  try {
    return find_prefill(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("environment variable MISTRAL_EXT_ATTENTION: ") +
                                error.what());
  }
}

Prefill& active() {
  static Prefill instance = initial_prefill();
  return instance;
}

// Whether a sequence could need a prefill kernel. The host knows only max_count, not the lengths.
bool prefills(const AttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads;
  return group > kDecodeRows || !is_decode(p.max_count, group);
}

// Whether the kernel for sm_90a does the prefill. It cannot write a log-sum-exp.
bool uses_hopper(const AttentionParams& p) { return active_prefill() == Prefill::sm90 && !p.lse; }

template <class T, int D>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  const int64_t group = p.heads / p.kv_heads;
  const auto kv_heads = static_cast<unsigned>(p.kv_heads);
  if (group <= kDecodeRows) {
    const dim3 grid(static_cast<unsigned>(p.splits), kv_heads,
                    static_cast<unsigned>(p.num_sequences));
    const cudaError_t status = launch_overlapping(
        attention_decode<T, D>, grid, dim3(kDecodeWarps * kWarp), kDecodeShared<T, D>, stream, p);
    if (status != cudaSuccess || !prefills(p)) return status;
  }
  if constexpr (kHasHopper) {  // other builds do not have attention_hopper
    if (uses_hopper(p)) return attention_hopper(p, stream);
  }
  const auto tiles = static_cast<unsigned>(prefill_tiles(p));
  return launch(attention_prefill<T, D>, dim3(tiles, kv_heads), dim3(kPrefillWarps * kWarp),
                kPrefillShared<T, D>, stream, p);
}

template <class T>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64: return launch_attention<T, 64>(p, stream);
    case 128: return launch_attention<T, 128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* name(Prefill prefill) { return prefill == Prefill::sm80 ? "sm80" : "sm90"; }
std::vector<Prefill> built_prefills() {
  return kHasHopper ? std::vector{Prefill::sm80, Prefill::sm90} : std::vector{Prefill::sm80};
}
Prefill active_prefill() { return active(); }
void select_prefill(const std::string& name) { active() = find_prefill(name); }

AttentionScratch attention_scratch(const AttentionParams& p, int64_t longest) {
  // Decode divides the keys of each head into splits, so that few sequences occupy all
  // multiprocessors too, with two blocks each. But a warp should have about 2 tiles of keys or
  // more, because a smaller split is not worth its merge.
  const int64_t blocks = p.num_sequences * p.kv_heads;
  const int64_t wanted = ceil_div(2 * multiprocessors(), max(blocks, 1));
  const int64_t sensible = ceil_div(longest, 2 * kDecodeWarps * kDecodeKeys);
  AttentionScratch scratch;
  scratch.splits = static_cast<int32_t>(max(min(wanted, sensible), 1));
  scratch.prefill_splits = 1;
  scratch.counters = blocks;
  // p.head_dim + 4 is kPartialRow (merge.cuh).
  scratch.partials =
      scratch.splits == 1 ? 0 : blocks * scratch.splits * kDecodeRows * (p.head_dim + 4);
  if (uses_hopper(p) && prefills(p)) add_hopper_scratch(scratch, p, longest);
  return scratch;
}

cudaError_t attention(const AttentionParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::bf16: return launch_attention<__nv_bfloat16>(p, stream);
    case DType::f16: return launch_attention<__half>(p, stream);
    case DType::f32: return cudaErrorInvalidValue;  // tensor cores have no fp32 product
  }
  return cudaErrorInvalidValue;
}

}  // namespace mistral::cuda

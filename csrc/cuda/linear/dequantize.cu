// Dequantises rows of a weight. Grid: one thread for each 8 neighbouring values of the result, row
// after row.
#include <launch.cuh>

#include "../../linear.h"
#include "../common/element.cuh"
#include "../common/vec.cuh"
#include "formats.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;

// Reads the 8 values from k on of the row that begins at `row`, as pairs of bf16. They are not yet
// scaled, so they are small integers, which bf16 holds exactly.
template <class W>
__device__ __forceinline__ void read_pairs(const void* row, int64_t k, uint32_t (&pairs)[4]) {
  using T = typename W::Element;
  if constexpr (W::bytes(kValues * 4) == kValues * 4) {
    const uint2 words = load_global(static_cast<const uint2*>(row) + k / kValues);
    widen_int8<T>(words.x, pairs);
    widen_int8<T>(words.y, pairs + 2);
  } else {
    const auto* const words = static_cast<const uint32_t*>(row);
    W::widen_word(words, static_cast<int>(k / kValues), pairs);
  }
}

// Reads the Scaling (scales.cuh) of the 8 values from k on. `row` is the address of the scales of
// their row.
template <class W>
__device__ __forceinline__ Scaling read_scaling(const void* row, int64_t k, int64_t group) {
  using Scales = typename W::Scales;
  using Unit = typename Scales::Unit;
  const Unit* const from = static_cast<const Unit*>(row) + k / group * Scales::kUnits;
  const int i = static_cast<int>(k % kSuperBlock) / (W::kHalfSteps ? 16 : 32);
  Unit units[Scales::kUnits];
  if constexpr (W::kHalfSteps) {
    // The scales of 256 values are five words: four with 4 scales each, and one with d. Two words
    // are read, the one with scale i and the one with d. The former always goes to units[0],
    // because an array with a variable index would not stay in registers.
    units[0] = load_global(from + i / 4);
    units[4] = load_global(from + 4);
    return Scales(units).next(i & 3);
  } else {
#pragma unroll
    for (int j = 0; j < Scales::kUnits; ++j) units[j] = load_global(from + j);
    return Scales(units).next(i);
  }
}

template <class T, WeightFormat format>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kValues;
  if (i >= p.count * p.inputs) return;
  using W = typename WeightsOf<format, __nv_bfloat16>::type;
  using Scales = typename W::Scales;
  const int64_t place = i / p.inputs, k = i % p.inputs, group = p.weight.group;
  const int64_t row = p.indices ? load_global(p.indices + place) : place;
  float values[kValues];
  if (row < 0 || row >= p.weight.rows) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) values[j] = NAN;
  } else {
    uint32_t pairs[4];
    read_pairs<W>(static_cast<const char*>(p.weight.values) + row * W::bytes(p.inputs), k, pairs);
    const int64_t row_scales = p.inputs / group * kGroupBytes<Scales>;
    const auto* const scales = static_cast<const char*>(p.weight.scales) + row * row_scales;
    const Scaling scaling = read_scaling<W>(scales, k, group);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const uint32_t bits = j % 2 ? pairs[j / 2] & 0xffff0000u : pairs[j / 2] << 16;
      values[j] = __uint_as_float(bits) * scaling.factor;
      if constexpr (W::kOffset) values[j] += scaling.offset;
    }
  }
  constexpr int kWide = kVec16<T>;
#pragma unroll
  for (int first = 0; first < kValues; first += kWide) {
    float wide[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) wide[j] = values[first + j];
    store16(static_cast<T*>(p.out) + i + first, round_to<T>(wide));
  }
}

}  // namespace

cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.inputs % kValues != 0) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(p.count * p.inputs, int64_t{kThreads} * kValues);
  return with_element(p.dtype, [&](auto element) {
    return with_format(p.weight.format, [&](auto format) {
      if constexpr (format.value == WeightFormat::plain) {
        return cudaErrorInvalidValue;
      } else {
        return launch(dequantize_kernel<decltype(element), format.value>,
                      dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
      }
    });
  });
}

}  // namespace mistral::cuda

// Grid: a thread for each 8 neighbouring values of a weight, row after row.
#include <launch.cuh>

#include "../../linear.h"
#include "../common/element.cuh"
#include "../common/vec.cuh"
#include "formats.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;

// 8 values from k on of the row that begins at `row`.
template <class W>
__device__ __forceinline__ void read_values(const void* row, int64_t k, float (&values)[kValues]) {
  if constexpr (W::bytes(kValues) == 4) {
    const uint32_t word = load_global(static_cast<const uint32_t*>(row) + k / kValues);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t on_top = word << (28 - int4_shift(i));
      values[i] = static_cast<float>(static_cast<int32_t>(on_top) >> 28);
    }
  } else {
    const uint2 words = load_global(static_cast<const uint2*>(row) + k / kValues);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t byte = (i < 4 ? words.x : words.y) >> 8 * (i % 4);
      values[i] = static_cast<float>(static_cast<int8_t>(byte));
    }
  }
}

template <class T, WeightFormat format>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kValues;
  if (i >= p.weight.rows * p.inputs) return;
  const int64_t row = i / p.inputs, k = i % p.inputs;
  using W = typename WeightsOf<format, T>::type;
  using Scale = typename W::Scale;
  float values[kValues];
  read_values<W>(static_cast<const char*>(p.weight.values) + row * W::bytes(p.inputs), k, values);
  const int64_t group = p.weight.group;
  const auto* const scales = static_cast<const Scale*>(p.weight.scales) + row * (p.inputs / group);
  const float scale = to_float(load_global(scales + k / group));
  constexpr int kWide = kVec16<T>;
#pragma unroll
  for (int first = 0; first < kValues; first += kWide) {
    float products[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) products[j] = values[first + j] * scale;
    store16(static_cast<T*>(p.out) + i + first, round_to<T>(products));
  }
}

}  // namespace

cudaError_t dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.inputs % kValues != 0) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(p.weight.rows * p.inputs, int64_t{kThreads} * kValues);
  return with_element(p.dtype, [&](auto element) {
    return with_format(p.weight.format, [&](auto format) {
      if constexpr (format.value == WeightFormat::plain || !has_kernels(format.value)) {
        return cudaErrorInvalidValue;
      } else {
        return launch(dequantize_kernel<decltype(element), format.value>,
                      dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
      }
    });
  });
}

}  // namespace mistral::cuda

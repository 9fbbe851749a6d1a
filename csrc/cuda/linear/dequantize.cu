// Grid: a thread for each 8 neighbouring values of a weight, row after row.
#include <launch.cuh>

#include "../../linear.h"
#include "../common/element.cuh"
#include "../common/vec.cuh"

namespace mistral::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;

// 8 values from k on of the row that begins at `row`.
template <WeightFormat format>
__device__ __forceinline__ void read_values(const void* row, int64_t k, float (&values)[kValues]) {
  if constexpr (format == WeightFormat::int4) {
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
  const int64_t row_bytes = format == WeightFormat::int4 ? p.inputs / 2 : p.inputs;
  float values[kValues];
  read_values<format>(static_cast<const char*>(p.weight.values) + row * row_bytes, k, values);
  const bf16* scales = p.weight.scales + row * (p.inputs / p.group);
  const float scale = to_float(load_global(scales + k / p.group));
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
  if (p.inputs % kValues != 0 || p.format == WeightFormat::plain) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(p.weight.rows * p.inputs, int64_t{kThreads} * kValues);
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
    if (p.format == WeightFormat::int4) {
      return launch(dequantize_kernel<T, WeightFormat::int4>, grid, block, 0, stream, p);
    }
    return launch(dequantize_kernel<T, WeightFormat::int8>, grid, block, 0, stream, p);
  });
}

}  // namespace mistral::cuda

// The last step of RMSNorm. All kernels that normalise use it, so they round in the same places.
#pragma once

#include "common/vec.cuh"

namespace mistral::cuda {

// Multiplies h by the factor of its row, 1 / sqrt(mean(h^2) + eps), rounds to T, and multiplies by
// the weight. Mistral was trained with a rounding between the two products.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> scaled(const Vec<T, N>& h, const Vec<T, N>& weight,
                                            float factor) {
  float normalised[N], product[N];
#pragma unroll
  for (int i = 0; i < N; ++i) normalised[i] = h[i] * factor;
  const Vec<T, N> rounded = round_to<T>(normalised);
#pragma unroll
  for (int i = 0; i < N; ++i) product[i] = rounded[i] * weight[i];
  return round_to<T>(product);
}

}  // namespace mistral::cuda

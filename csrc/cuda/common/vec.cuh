// Loads and stores neighbouring elements. Kernels access tensors through this file, ptx.cuh or
// ptx_sm90.cuh, because the emulator checks and counts accesses there. Two things are accessed
// directly: variables of atomic operations, and the array `sequences` of the params (ring.h).
#pragma once

#include <initializer_list>

#include <ptx.cuh>

#include "element.cuh"

namespace mistral::cuda {

// A vector of N elements of T. It has 16 bytes, the size of the widest access. For rows that are
// not 16-byte aligned, it has one element.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  static_assert(N == 1 || N * sizeof(T) == 16);
  static constexpr int size = N;
  T values[N];

  __device__ __forceinline__ float operator[](int i) const { return to_float(values[i]); }
};

template <class T>
constexpr int kVec16 = 16 / sizeof(T);
template <class T>
using Vec16 = Vec<T, kVec16<T>>;

namespace detail {

template <class T>
__device__ __forceinline__ Vec16<T> from_bits(uint4 bits) {
  Vec16<T> v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T>
__device__ __forceinline__ uint4 to_bits(const Vec16<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

}  // namespace detail

template <class T>
__device__ __forceinline__ T load_global(const T* global, Site site = Site::here()) {
  return ld_global(global, site);
}
template <class T>
__device__ __forceinline__ void store_global(T* global, T value, Site site = Site::here()) {
  st_global(global, value, site);
}

template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* global, Site site = Site::here()) {
  return detail::from_bits<T>(ld_global_16(global, site));
}
template <class T>
__device__ __forceinline__ void store16(T* global, const Vec16<T>& v, Site site = Site::here()) {
  st_global_16(global, detail::to_bits(v), site);
}

template <class T>
__device__ __forceinline__ Vec16<T> load_shared16(const T* shared, Site site = Site::here()) {
  return detail::from_bits<T>(ld_shared_16(shared, site));
}
template <class T>
__device__ __forceinline__ void store_shared16(T* shared, const Vec16<T>& v,
                                               Site site = Site::here()) {
  st_shared_16(shared, detail::to_bits(v), site);
}

// Loads N elements. This is for kernels that are templates over N, with instances for 1 element and
// for 16 bytes.
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* global, Site site = Site::here()) {
  if constexpr (N == 1) {
    return {load_global(global, site)};
  } else {
    return load16(global, site);
  }
}
template <class T, int N>
__device__ __forceinline__ void store(T* global, const Vec<T, N>& v, Site site = Site::here()) {
  if constexpr (N == 1) {
    store_global(global, v.values[0], site);
  } else {
    store16(global, v, site);
  }
}

// Rounds N values to nearest even. 16-bit types are rounded two values at a time.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> round_to(const float (&values)[N]) {
  Vec<T, N> v;
  if constexpr (N > 1 && sizeof(T) == 2) {
    uint32_t words[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    memcpy(&v, words, sizeof v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v.values[i] = from_float<T>(values[i]);
  }
  return v;
}

// Whether the rows of some tensors may be accessed 16 bytes at a time. `rows` are the first rows of
// the tensors; a null pointer counts as aligned. `strides` are the distances from row to row, in
// elements of T.
template <class T>
bool fit_vec16(std::initializer_list<const void*> rows, std::initializer_list<int64_t> strides) {
  bool fit = true;
  for (const void* row : rows) fit = fit && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  for (const int64_t stride : strides) fit = fit && stride % kVec16<T> == 0;
  return fit;
}

}  // namespace mistral::cuda

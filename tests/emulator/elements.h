// Elements of 16 bits as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace emulator {

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }

template <class T>
void unpack(uint32_t pair, float& low, float& high) {
  T elements[2];
  memcpy(static_cast<void*>(elements), &pair, sizeof pair);
  low = widen(elements[0]);
  high = widen(elements[1]);
}

}  // namespace emulator

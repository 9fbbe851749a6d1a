// Makes tensor maps, which describe tensors to the copy engine (tma_load_2d in ptx_sm90.cuh). The
// host makes a map and passes it to a kernel in a const __grid_constant__ parameter.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mistral::cuda {

// A tensor of 16-bit elements. The elements of axis 0 lie side by side.
struct TensorMapShape {
  int rank;                  // 2 to 5
  uint64_t sizes[5];         // at least 1
  uint64_t stride_bytes[5];  // multiples of 16; that of axis 0 is ignored
  uint32_t box[5];           // the size of a copy: 64 along axis 0, 1 to 256 along the other axes
};

// Makes the map of a tensor that begins at `base`, a multiple of 16. A copy with this map writes
// the rows of a box, 128 bytes each, to shared memory one after another. In row r, 16-byte piece i
// goes to place (i ^ r) % 8 (the 128-byte swizzle). Elements outside the tensor become zeros.
// Making a map does not access device memory.
cudaError_t make_tensor_map(CUtensorMap* map, const void* base, const TensorMapShape& shape);

}  // namespace mistral::cuda

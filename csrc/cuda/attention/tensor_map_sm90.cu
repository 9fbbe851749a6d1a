#include "tensor_map_sm90.h"

#include "../common/status.h"

namespace mistral::cuda {
namespace {

// Finds the function that makes tensor maps, the only driver function that is needed. The runtime
// gives its address. So nothing is linked against the driver, and the extension also loads on
// machines without one.
cudaError_t find_encoder(decltype(&cuTensorMapEncodeTiled)* encoder) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  // CUDA 12.5 added the runtime function that takes a version. CUDA 13 removed the other one.
#if CUDART_VERSION < 12050
  cudaError_t status = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#else
  constexpr unsigned kSince = 12000;  // CUDA 12.0, which added cuTensorMapEncodeTiled
  cudaError_t status =
      cudaGetDriverEntryPointByVersion(kName, &found, kSince, cudaEnableDefault, &result);
#endif
  if (checked(status) != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  *encoder = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  return cudaSuccess;
}

}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, const void* base, const TensorMapShape& shape) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  static const cudaError_t found = find_encoder(&encode);
  if (found != cudaSuccess) return found;
  if (shape.box[0] != 64) return cudaErrorInvalidValue;
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, uint32_t(shape.rank), const_cast<void*>(base),
             shape.sizes, shape.stride_bytes + 1, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mistral::cuda

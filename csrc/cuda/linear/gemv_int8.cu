// The kernels of products with weights in int8.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::int8>;

}  // namespace mistral::cuda

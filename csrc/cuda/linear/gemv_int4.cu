// The kernels of products with weights in int4.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::int4>;

}  // namespace mistral::cuda

// The kernels of products with weights in q8_0.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q8_0>;

}  // namespace mistral::cuda

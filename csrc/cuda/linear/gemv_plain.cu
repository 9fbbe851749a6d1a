// The kernels of products with plain weights, which have 16 bits.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::plain>;

}  // namespace mistral::cuda

// The kernels of products with weights in super-blocks of 256 values, whose scales have two levels.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q4_k>;
template struct LinearKernels<WeightFormat::q5_k>;
template struct LinearKernels<WeightFormat::q6_k>;
template struct LinearKernels<WeightFormat::iq4_xs>;

}  // namespace mistral::cuda

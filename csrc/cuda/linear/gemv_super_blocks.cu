// The kernels of products with weights whose scales have two levels, for 256 values.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q4_k>;
template struct LinearKernels<WeightFormat::q5_k>;
template struct LinearKernels<WeightFormat::q6_k>;
template struct LinearKernels<WeightFormat::iq4_xs>;

}  // namespace mistral::cuda

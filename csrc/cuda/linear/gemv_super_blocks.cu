// The kernels of products with weights in super-blocks of 256 values. A super-block has a scale d
// for all its values, and a further scale for each 16 or 32 of them (csrc/formats.h).
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q4_k>;
template struct LinearKernels<WeightFormat::q5_k>;
template struct LinearKernels<WeightFormat::q6_k>;
template struct LinearKernels<WeightFormat::iq4_xs>;

}  // namespace mistral::cuda

// The kernels of products with weights in 4 bits, with scales for 32 to 128 values.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q4_0>;
template struct LinearKernels<WeightFormat::q4_1>;
template struct LinearKernels<WeightFormat::q4_z>;
template struct LinearKernels<WeightFormat::iq4_nl>;

}  // namespace mistral::cuda

// The kernels of products with weights in q4_0, q4_1, q4_z and iq4_nl.
#include "gemv_launch.cuh"

namespace mistral::cuda {

template struct LinearKernels<WeightFormat::q4_0>;
template struct LinearKernels<WeightFormat::q4_1>;
template struct LinearKernels<WeightFormat::q4_z>;
template struct LinearKernels<WeightFormat::iq4_nl>;

}  // namespace mistral::cuda

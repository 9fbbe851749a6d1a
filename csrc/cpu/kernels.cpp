#include "kernels.h"

namespace mistral::cpu::MISTRAL_ISA {

extern const Kernels kernels;
const Kernels kernels = {
#define OP(op, Params) &op,
#define OP_WITH_SCRATCH(op, Params) &op, &op##_scratch_bytes,
#include "../ops.def"
    &linear_rounds,
    &highest_rank,
};

}  // namespace mistral::cpu::MISTRAL_ISA

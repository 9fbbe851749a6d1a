#include "kernels.h"

namespace mistral::cpu::MISTRAL_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    &attention, &attention_scratch_bytes, &linear, &linear_scratch_bytes, &rms_norm, &rope,
    &swiglu};

}  // namespace mistral::cpu::MISTRAL_ISA

// Selects among kernels for the same op, and whether kernels overlap.
#pragma once

#include <string>
#include <vector>

namespace mistral::cuda {

// The prefill kernel: sm80, which all devices run, or sm90, for sm_90a alone.
enum class Prefill { sm80, sm90 };
const char* name(Prefill prefill);

std::vector<Prefill> built_prefills();  // the kernels of this build

// The kernel in use. It is the kernel that the environment variable MISTRAL_EXT_ATTENTION names,
// else sm80, because sm90 has not run on hardware yet. If this build does not have the named
// kernel, this function and `attention` throw std::invalid_argument.
Prefill active_prefill();

// Throws std::invalid_argument if this build does not have the kernel.
void select_prefill(const std::string& name);

// Whether the kernels of a decode step may overlap. If so, a kernel fetches its first weights while
// the kernels before it end, so none of these may write weights. The environment variable
// MISTRAL_EXT_OVERLAP (0 or 1) sets this, and so does `overlap`.
bool overlapping();
void overlap(bool wanted);

}  // namespace mistral::cuda

// Settings of the process: which prefill kernel `attention` uses, and whether kernels overlap.
#pragma once

#include <string>
#include <vector>

namespace mistral::cuda {

// The prefill kernels. All supported devices run sm80. Only Hopper runs sm90.
enum class Prefill { sm80, sm90 };
const char* name(Prefill prefill);

std::vector<Prefill> built_prefills();  // the prefill kernels that this build has

// The prefill kernel in use. Initially it is the kernel that the environment variable
// MISTRAL_EXT_ATTENTION names. If the variable is unset or empty, it is sm80, because sm90 has not
// run on hardware yet. If this build does not have the named kernel, this function and `attention`
// throw std::invalid_argument.
Prefill active_prefill();

// Changes the prefill kernel in use. Throws std::invalid_argument if this build does not have it.
void select_prefill(const std::string& name);

// Whether the kernels of a decode step may overlap. With overlap, a kernel fetches its first
// weights while earlier kernels still run, so the earlier kernels must not write weights. The
// initial value is that of the environment variable MISTRAL_EXT_OVERLAP (0 or 1), or 0 if the
// variable is unset or empty. Both functions throw std::invalid_argument if it has another value.
bool overlapping();
void overlap(bool wanted);  // changes the value

}  // namespace mistral::cuda

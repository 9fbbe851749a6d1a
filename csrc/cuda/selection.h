// Which kernels run where there are several, and how.
#pragma once

#include <string>
#include <vector>

namespace mistral::cuda {

// The kernel that prefills: that of sm_80, which all devices run, or that of sm_90a.
enum class Prefill { sm80, sm90 };
const char* name(Prefill prefill);

std::vector<Prefill> built_prefills();  // those of this build

// The one in use: the one that the environment variable MISTRAL_EXT_ATTENTION names, else sm80: the
// other one has not run on hardware yet. Throws std::invalid_argument, as `attention` does, if it
// names none of this build's.
Prefill active_prefill();

// Throws std::invalid_argument for a name that is none of this build's.
void select_prefill(const std::string& name);

// Whether the kernels of a decode step may overlap: each then fetches its first weights while the
// one before it ends, so that weights must not be what that one computes. Set by the environment
// variable MISTRAL_EXT_OVERLAP, 0 or 1, or by `overlap`.
bool overlapping();
void overlap(bool wanted);

}  // namespace mistral::cuda

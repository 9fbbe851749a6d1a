// Runs AVX-VNNI's instructions on a processor that has AVX2 and does not know them.
#pragma once

#include <csignal>
#include <cstdint>

namespace mistral::emulated {

// While one lives, the processor's "illegal instruction" is taken for one of AVX-VNNI, in all
// threads of the process.
class Trap {
 public:
  Trap();
  ~Trap();
  Trap(const Trap&) = delete;
  Trap& operator=(const Trap&) = delete;

 private:
  struct sigaction before_;
};

// The instructions that were emulated so far.
int64_t executed();

}  // namespace mistral::emulated

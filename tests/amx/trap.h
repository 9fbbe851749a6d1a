// Runs AMX's instructions on a processor that does not know them.
#pragma once

#include <csignal>

namespace mistral::cpu::emulated {

// While one lives, the processor's "illegal instruction" is taken as a call of the emulation: of
// all threads of the process.
class Trap {
 public:
  Trap();
  ~Trap();
  Trap(const Trap&) = delete;
  Trap& operator=(const Trap&) = delete;

 private:
  struct sigaction before_;
};

}  // namespace mistral::cpu::emulated

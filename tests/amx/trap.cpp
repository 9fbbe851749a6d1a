#include "trap.h"

#include "../vex.h"
#include "emulation.h"

namespace mistral::cpu::emulated {
namespace {

using namespace vex;

bool execute(const Instruction& i) {
  const bool memory = i.mod != 3;
  if (i.w || i.l || i.reg > 7) return false;
  if (i.opcode == 0x49 && i.prefix == none && memory) {
    TileConfig config;
    memcpy(&config, i.address, sizeof config);
    configure(config);
  } else if (i.opcode == 0x49 && i.prefix == none && i.reg == 0 && i.rm == 0) {
    release();
  } else if (i.opcode == 0x49 && i.prefix == pF2 && !memory && i.rm == 0) {
    zero(i.reg);
  } else if (i.opcode == 0x4b && i.prefix == pF2 && memory && i.rm % 8 == 4) {
    load(i.reg, i.address, i.stride);
  } else if (i.opcode == 0x4b && i.prefix == pF3 && memory && i.rm % 8 == 4) {
    store(i.reg, i.address, i.stride);
  } else if (i.opcode == 0x5c && i.prefix == pF3 && !memory) {
    dot_bf16(i.reg, i.rm, i.vvvv);
  } else {
    return false;
  }
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context_) {
  auto& context = *static_cast<ucontext_t*>(context_);
  auto& next = context.uc_mcontext.gregs[REG_RIP];
  Instruction instruction;
  if (decode(context, reinterpret_cast<const uint8_t*>(next), instruction) &&
      execute(instruction)) {
    next += instruction.bytes;
  } else {
    signal(SIGILL, SIG_DFL);  // and so it ends, when it is executed again
  }
}

}  // namespace

Trap::Trap() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before_);
}

Trap::~Trap() { sigaction(SIGILL, &before_, nullptr); }

}  // namespace mistral::cpu::emulated

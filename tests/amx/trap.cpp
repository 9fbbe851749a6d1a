#include "trap.h"

#include "emulation.h"

namespace mistral::cpu::emulated {

using namespace vex;

bool execute(const Instruction& i, ucontext_t&) {
  const bool memory = i.mod != 3;
  if (i.w || i.l || i.reg > 7) return false;
  if (i.opcode == 0x49 && i.prefix == none && memory) {
    TileConfig config;
    memcpy(&config, i.address, sizeof config);
    configure(config);
  } else if (i.opcode == 0x49 && i.prefix == p66 && memory) {
    const TileConfig config = configuration();
    memcpy(i.address, &config, sizeof config);
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

}  // namespace mistral::cpu::emulated

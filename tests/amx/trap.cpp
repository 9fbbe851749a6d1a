#include "trap.h"

#include <ucontext.h>

#include <cstring>

#include "emulation.h"

namespace mistral::cpu::emulated {
namespace {

int64_t general_register(const ucontext_t& context, int number) {
  constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

// An instruction of AMX, as Intel's manual has it ("Instruction Format"):
//   c4, ~R ~X ~B and the opcode map, W ~vvvv L pp, opcode, ModRM, and for memory SIB and
//   displacement
struct Instruction {
  int opcode, prefix, mod, reg, rm, vvvv;
  char* address;  // of what is not a register
  int64_t stride;
  int64_t bytes;
};

enum Prefix { none, p66, pF3, pF2 };

// False: it is none of AMX.
bool decode(const ucontext_t& context, const uint8_t* code, Instruction& out) {
  constexpr int kVex = 0xc4, kMap0F38 = 2, kWOrL = 0x84;
  if (code[0] != kVex || (code[1] & 31) != kMap0F38 || (code[2] & kWOrL) != 0) return false;
  const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
  out = {};
  out.prefix = code[2] & 3;
  out.vvvv = ~code[2] >> 3 & 15;
  out.opcode = code[3];
  out.mod = code[4] >> 6;
  out.reg = code[4] >> 3 & 7;
  out.rm = code[4] & 7;
  out.bytes = 5;
  if (out.mod == 3) return true;

  int64_t base = 0;
  int displacement_bytes = out.mod == 1 ? 1 : out.mod == 2 ? 4 : 0;
  bool relative = false;  // to the next instruction
  if (out.rm == 4) {
    const int sib = code[out.bytes++], index = (sib >> 3 & 7) | x;
    if (index != 4) out.stride = general_register(context, index) << (sib >> 6);
    if ((sib & 7) == 5 && out.mod == 0) {
      displacement_bytes = 4;
    } else {
      base = general_register(context, (sib & 7) | b);
    }
  } else if (out.rm == 5 && out.mod == 0) {
    relative = true;
    displacement_bytes = 4;
  } else {
    base = general_register(context, out.rm | b);
  }
  int32_t displacement = displacement_bytes == 1 ? static_cast<int8_t>(code[out.bytes]) : 0;
  if (displacement_bytes == 4) memcpy(&displacement, code + out.bytes, sizeof displacement);
  out.bytes += displacement_bytes;
  if (relative) base = reinterpret_cast<int64_t>(code + out.bytes);
  out.address = reinterpret_cast<char*>(base + displacement);
  return true;
}

bool execute(const Instruction& i) {
  const bool memory = i.mod != 3;
  if (i.opcode == 0x49 && i.prefix == none && memory) {
    TileConfig config;
    memcpy(&config, i.address, sizeof config);
    configure(config);
  } else if (i.opcode == 0x49 && i.prefix == none && i.reg == 0 && i.rm == 0) {
    release();
  } else if (i.opcode == 0x49 && i.prefix == pF2 && !memory && i.rm == 0) {
    zero(i.reg);
  } else if (i.opcode == 0x4b && i.prefix == pF2 && memory && i.rm == 4) {
    load(i.reg, i.address, i.stride);
  } else if (i.opcode == 0x4b && i.prefix == pF3 && memory && i.rm == 4) {
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

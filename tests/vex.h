// Decodes instructions with VEX prefixes that this processor does not know, from the state in which
// it refused them, and has others run them. For the emulations in tests/amx and tests/isas.
#pragma once

#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <cstring>

namespace mistral::vex {

inline int64_t general_register(const ucontext_t& context, int number) {
  constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

enum Prefix { none, p66, pF3, pF2 };

// An instruction as Intel's manual has it ("Instruction Format"):
//   c4, ~R ~X ~B and the opcode map, W ~vvvv L pp, opcode, ModRM, and for memory SIB and
//   displacement
struct Instruction {
  int opcode, prefix, mod, reg, rm, vvvv;
  bool w, l;
  char* address;  // of an operand in memory
  int64_t stride;
  int64_t bytes;
};

// False: it is none of the opcode map 0f 38.
inline bool decode(const ucontext_t& context, const uint8_t* code, Instruction& out) {
  constexpr int kVex = 0xc4, kMap0F38 = 2;
  if (code[0] != kVex || (code[1] & 31) != kMap0F38) return false;
  const int r = code[1] & 0x80 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
  out = {};
  out.w = code[2] & 0x80;
  out.l = code[2] & 4;
  out.prefix = code[2] & 3;
  out.vvvv = ~code[2] >> 3 & 15;
  out.opcode = code[3];
  out.mod = code[4] >> 6;
  out.reg = (code[4] >> 3 & 7) | r;
  const int rm = code[4] & 7;
  out.rm = rm | b;
  out.bytes = 5;
  if (out.mod == 3) return true;

  int64_t base = 0;
  int displacement_bytes = out.mod == 1 ? 1 : out.mod == 2 ? 4 : 0;
  bool relative = false;  // to the next instruction
  if (rm == 4) {
    const int sib = code[out.bytes++], index = (sib >> 3 & 7) | x;
    if (index != 4) out.stride = general_register(context, index) << (sib >> 6);
    if ((sib & 7) == 5 && out.mod == 0) {
      displacement_bytes = 4;
    } else {
      base = general_register(context, (sib & 7) | b);
    }
  } else if (rm == 5 && out.mod == 0) {
    relative = true;
    displacement_bytes = 4;
  } else {
    base = general_register(context, rm | b);
  }
  int32_t displacement = displacement_bytes == 1 ? static_cast<int8_t>(code[out.bytes]) : 0;
  if (displacement_bytes == 4) memcpy(&displacement, code + out.bytes, sizeof displacement);
  out.bytes += displacement_bytes;
  if (relative) base = reinterpret_cast<int64_t>(code + out.bytes);
  out.address = reinterpret_cast<char*>(base + displacement);
  return true;
}

// Runs an instruction on the state of the thread that met it. False: it is none of its own.
using Execute = bool (*)(const Instruction&, ucontext_t&);

// While it lives, `execute` runs the instructions that the processor does not know, of all threads
// of the process. There is one at a time.
class Trap {
 public:
  explicit Trap(Execute execute) {
    execute_ = execute;
    struct sigaction action{};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before_);
  }
  ~Trap() { sigaction(SIGILL, &before_, nullptr); }
  Trap(const Trap&) = delete;
  Trap& operator=(const Trap&) = delete;

 private:
  static void on_illegal_instruction(int, siginfo_t*, void* context_) {
    auto& context = *static_cast<ucontext_t*>(context_);
    auto& next = context.uc_mcontext.gregs[REG_RIP];
    Instruction instruction;
    if (decode(context, reinterpret_cast<const uint8_t*>(next), instruction) &&
        execute_(instruction, context)) {
      next += instruction.bytes;
    } else {
      signal(SIGILL, SIG_DFL);  // and so it ends, when it is executed again
    }
  }

  static inline Execute execute_;
  struct sigaction before_;
};

}  // namespace mistral::vex

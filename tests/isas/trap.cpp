#include "trap.h"

#include <atomic>

namespace mistral::emulated {
namespace {

std::atomic<int64_t> count{0};

// The registers of the interrupted thread, as XSAVE puts them on the stack of a signal (Intel's
// manual, "Standard Format of the Extended Region"): the lower halves of ymm registers where SSE
// has them, the upper halves together.
class Registers {
 public:
  explicit Registers(ucontext_t& context)
      : area_(reinterpret_cast<char*>(context.uc_mcontext.fpregs)) {}

  void read(int number, char* out) const {
    memcpy(out, area_ + kLow + 16 * number, 16);
    // What is in its initial state need not be in the area.
    if (components() & kAvx) {
      memcpy(out + 16, area_ + kHigh + 16 * number, 16);
    } else {
      memset(out + 16, 0, 16);
    }
  }
  void write(int number, const char* value) {
    if (!(components() & kAvx)) memset(area_ + kHigh, 0, 256);
    const uint64_t now = components() | kSse | kAvx;
    memcpy(area_ + kComponents, &now, sizeof now);
    memcpy(area_ + kLow + 16 * number, value, 16);
    memcpy(area_ + kHigh + 16 * number, value + 16, 16);
  }

 private:
  static constexpr int kLow = 160, kComponents = 512, kHigh = 576;
  static constexpr uint64_t kSse = 2, kAvx = 4;

  uint64_t components() const {
    uint64_t bits;
    memcpy(&bits, area_ + kComponents, sizeof bits);
    return bits;
  }

  char* area_;
};

// VPDPBUSD: adds to each lane the products of 4 unsigned bytes and 4 signed bytes.
int32_t add_byte_products(int32_t sum, const char* without_sign, const char* with_sign) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<uint8_t>(without_sign[i]) * static_cast<int8_t>(with_sign[i]);
  }
  return sum;
}
// VPDPWSSD: adds the products of 2 signed numbers of 16 bits.
int32_t add_pairs(int32_t sum, const char* a, const char* b) {
  int16_t x[2], y[2];
  memcpy(x, a, sizeof x);
  memcpy(y, b, sizeof y);
  return static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(x[0] * y[0]) +
                              static_cast<uint32_t>(x[1] * y[1]));
}

}  // namespace

bool execute(const vex::Instruction& i, ucontext_t& context) {
  Registers registers(context);
  constexpr int kByteProducts = 0x50, kPairs = 0x52;
  const bool known = i.opcode == kByteProducts || i.opcode == kPairs;
  if (!known || i.prefix != vex::p66 || i.w || !i.l) return false;
  char sums[32], first[32], second[32];
  registers.read(i.reg, sums);
  registers.read(i.vvvv, first);
  if (i.mod == 3) {
    registers.read(i.rm, second);
  } else {
    memcpy(second, i.address + i.stride, sizeof second);
  }
  for (int at = 0; at < 32; at += 4) {
    int32_t sum;
    memcpy(&sum, sums + at, sizeof sum);
    sum = i.opcode == kPairs ? add_pairs(sum, first + at, second + at)
                             : add_byte_products(sum, first + at, second + at);
    memcpy(sums + at, &sum, sizeof sum);
  }
  registers.write(i.reg, sums);
  count.fetch_add(1, std::memory_order_relaxed);
  return true;
}

int64_t executed() { return count; }

}  // namespace mistral::emulated

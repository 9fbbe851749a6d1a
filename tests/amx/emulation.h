// AMX in plain C++, so that the kernels made of it are tested on processors without it: the machine
// code that users get, whose instructions come here when the processor refuses them (trap.h).
//
// They do what Intel's manual says ("Instruction Set Reference": LDTILECFG, TILELOADD, TDPBF16PS
// and so on), to the bit. Where a processor would raise an exception, they do nothing and note an
// error: kernels run in threads that nothing may be thrown from.
#pragma once

#include <cstdint>
#include <string>

#include "../../csrc/cpu/simd/amx.h"

namespace mistral::cpu::emulated {

void configure(const TileConfig& config);
TileConfig configuration();
void zero(int tile);
void load(int tile, const void* p, int64_t stride);
void store(int tile, void* p, int64_t stride);
void dot_bf16(int c, int a, int b);

// What all threads have executed since the last call.
struct Counts {
  int64_t configured, loads, stores, dots;
};
Counts take_counts();

// Threads whose tiles are in use.
int configured_threads();

// The first error since the last call, or "".
std::string take_error();

}  // namespace mistral::cpu::emulated

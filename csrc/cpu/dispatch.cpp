// Chooses the instruction set once and forwards each op to its table.
#include <cstdlib>
#include <stdexcept>

#if defined(MISTRAL_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"
#include "kernels.h"

namespace mistral::cpu {

namespace scalar {
extern const Kernels kernels;
}
#ifdef MISTRAL_X86
constexpr Isa kNewestBuilt = Isa::MISTRAL_NEWEST_ISA;
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

// Whether the processor has AMX with bf16, and the operating system lets this process use it. A
// process must ask, because tiles add 8 KB to what is saved of each thread.
bool amx_permitted() {
#if defined(MISTRAL_X86) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // cpuid leaf 7, edx
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether this binary holds the set and the processor has it.
bool runs(Isa isa) {
#ifdef MISTRAL_X86
  if (isa > kNewestBuilt) return false;
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return runs(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::amx: {
      static const bool permitted = amx_permitted();
      return permitted && runs(Isa::avx512_bf16);
    }
  }
#endif
  return isa == Isa::scalar;
}

const Kernels* table(Isa isa) {
#ifdef MISTRAL_X86
#define TABLE(set)                             \
  if constexpr (Isa::set <= kNewestBuilt) {    \
    if (isa == Isa::set) return &set::kernels; \
  }
  TABLE(avx2)
  TABLE(avx512)
  TABLE(avx512_bf16)
  TABLE(amx)
#undef TABLE
#endif
  return &scalar::kernels;
}

Isa find_supported(const std::string& wanted) {
  std::string names;
  for (Isa isa : supported_isas()) {
    if (wanted == name(isa)) return isa;
    names += names.empty() ? name(isa) : std::string(", ") + name(isa);
  }
  throw std::invalid_argument("instruction set is '" + wanted +
                              "', expected one that this processor runs: " + names);
}

// Leaves out amx: it was tested in an emulator only, and never run or measured on hardware.
Isa fastest_isa() {
  Isa fastest = Isa::scalar;
  for (Isa isa : supported_isas()) {
    if (isa != Isa::amx) fastest = isa;
  }
  return fastest;
}

Isa initial_isa() {
  const char* wanted = std::getenv("MISTRAL_EXT_ISA");
  if (!wanted || !*wanted) return fastest_isa();
  try {
    return find_supported(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("environment variable MISTRAL_EXT_ISA: ") +
                                error.what());
  }
}

struct Active {
  Isa isa;
  const Kernels* kernels;
};

// Initialised at the first use, not when the module is loaded, so that an error reaches the caller.
Active& active() {
  static Active instance = [] {
    const Isa isa = initial_isa();
    return Active{isa, table(isa)};
  }();
  return instance;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (runs(isa)) supported.push_back(isa);
  }
  return supported;
}

Isa active_isa() { return active().isa; }

void select_isa(const std::string& wanted) {
  const Isa isa = find_supported(wanted);
  active() = Active{isa, table(isa)};
}

#define OP(op, Params) \
  void op(const Params& p, int threads) { active().kernels->op(p, threads); }
#define OP_WITH_SCRATCH(op, Params)                                           \
  void op(const Params& p, int threads) { active().kernels->op(p, threads); } \
  int64_t op##_scratch_bytes(const Params& p) { return active().kernels->op##_scratch_bytes(p); }
#include "../ops.def"

bool linear_rounds(DType dtype, WeightFormat format, int64_t tokens) {
  return active().kernels->linear_rounds(dtype, format, tokens);
}

void linear_rope(const LinearRopeParams& p, int threads) {
  linear(p.linear, threads);
  rope(p.rope, threads);
}

}  // namespace mistral::cpu

// Chooses the active instruction set, and calls ops through its table of kernels.
#include <cstdlib>
#include <stdexcept>

#include "isa.h"
#include "kernels.h"
#include "linear_sets.h"
#include "processor.h"

namespace mistral::cpu {

#define KERNELS(isa)            \
  namespace isa {               \
  extern const Kernels kernels; \
  }

KERNELS(scalar)
#if defined(MISTRAL_X86)
KERNELS(avx2)
KERNELS(avx512)
KERNELS(avx512_bf16)
KERNELS(amx)
#elif defined(MISTRAL_AARCH64)
KERNELS(neon)
KERNELS(neon_bf16)
#endif

namespace {

// The last set, in the order of isa.h, that this binary holds.
constexpr Isa kNewest = Isa::MISTRAL_NEWEST_ISA;

// The table of a set, or null if this binary does not hold the set.
const Kernels* table(Isa isa) {
#define TABLE(set)                             \
  if constexpr (Isa::set <= kNewest) {         \
    if (isa == Isa::set) return &set::kernels; \
  }
#define LINEAR_TABLE(set, others)                                \
  if constexpr (Isa::set <= kNewest) {                           \
    static const Kernels set##_kernels = [] {                    \
      Kernels kernels = others::kernels;                         \
      kernels.linear = &set::linear;                             \
      kernels.linear_scratch_bytes = &set::linear_scratch_bytes; \
      kernels.linear_rounds = &set::linear_rounds;               \
      return kernels;                                            \
    }();                                                         \
    if (isa == Isa::set) return &set##_kernels;                  \
  }
  TABLE(scalar)
#if defined(MISTRAL_X86)
  TABLE(avx2)
#if defined(MISTRAL_AVXVNNI)
  LINEAR_TABLE(avxvnni, avx2)
#endif
  TABLE(avx512)
  TABLE(avx512_bf16)
  TABLE(amx)
#elif defined(MISTRAL_AARCH64)
  TABLE(neon)
  LINEAR_TABLE(neon_dotprod, neon)
  TABLE(neon_bf16)
  LINEAR_TABLE(neon_i8mm, neon_bf16)
#endif
#undef TABLE
#undef LINEAR_TABLE
  return nullptr;
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

Isa initial_isa() {
  const char* wanted = std::getenv("MISTRAL_EXT_ISA");
  if (!wanted || !*wanted) return supported_isas().back();
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

// The initial set is chosen when it is first needed, not when the module is loaded. So the caller
// that needs it gets the error if MISTRAL_EXT_ISA names an unsupported set.
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
#define NAME(isa) \
  case Isa::isa: return #isa;
    MISTRAL_ISAS(NAME)
#undef NAME
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> supported;
#define ADD(isa) \
  if (table(Isa::isa) && processor_has(Isa::isa)) supported.push_back(Isa::isa);
  MISTRAL_ISAS(ADD)
#undef ADD
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

const Kernels& active_kernels() { return *active().kernels; }

void linear_rope(const LinearRopeParams& p, int threads) {
  linear(p.linear, threads);
  rope(p.rope, threads);
}

}  // namespace mistral::cpu

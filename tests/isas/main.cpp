// Compares every kernel of every instruction set that this processor runs with the scalar kernels.
// On x86 the set avxvnni is compared on other processors too: its instructions are emulated there.
#include <algorithm>
#include <cstring>

#include "../../csrc/cpu/linear_sets.h"
#include "compare.h"
#if defined(MISTRAL_AVXVNNI)
#include "trap.h"
#endif

namespace mistral::comparison {
namespace {

int compared = 0, failed = 0;
const Set* current = nullptr;

}  // namespace

Set set_of(const char* name) {
  bool linear_alone = false;
  for (cpu::Isa isa : cpu::supported_isas()) {
    if (!strcmp(cpu::name(isa), name)) linear_alone = cpu::is_linear_set(isa);
  }
  return {name, &cpu::linear, &cpu::linear_scratch_bytes, &cpu::linear_rounds, name, linear_alone};
}

const Set kScalar = set_of("scalar");

void use(const Set& set) {
  current = &set;
  cpu::select_isa(set.selected);
}
const Set& in_use() { return *current; }

void report(const std::string& label, bool close, const std::string& detail) {
  ++compared;
  if (close) return;
  if (++failed <= 40) printf("  %s: %s\n", label.c_str(), detail.c_str());
}
int comparisons() { return compared; }
int failures() { return failed; }

namespace {

void compare_set(const Set& set) {
  use(set);
  const int before = compared, failed_before = failed;
  compare_linear(set);
  if (!set.linear_alone) {
    compare_rows(set);
    compare_attention(set);
    compare_lora(set);
    compare_quantize(set);
    compare_sample(set);
  }
  printf("%s: %d comparisons, %d failed\n", set.name.c_str(), compared - before,
         failed - failed_before);
}

}  // namespace
}  // namespace mistral::comparison

using namespace mistral;
using namespace mistral::comparison;

// Arguments: the sets to compare; none: all that this processor runs.
int main(int count, char** names) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  printf("%s in use\n", cpu::name(cpu::active_isa()));
  const std::vector<std::string> wanted(names + 1, names + count);
  const auto is_wanted = [&](const char* name) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end();
  };
  const std::vector<cpu::Isa> isas = cpu::supported_isas();
  for (cpu::Isa isa : isas) {
    if (isa == cpu::Isa::scalar || !is_wanted(cpu::name(isa))) continue;
    compare_set(set_of(cpu::name(isa)));
  }
#if defined(MISTRAL_AVXVNNI)
  if (is_wanted("avxvnni") &&
      std::find(isas.begin(), isas.end(), cpu::Isa::avxvnni) == isas.end()) {
    const vex::Trap trap(emulated::execute);
    compare_set({"avxvnni", &cpu::avxvnni::linear, &cpu::avxvnni::linear_scratch_bytes,
                 &cpu::avxvnni::linear_rounds, "avx2", true});
    printf("avxvnni: %lld instructions were emulated\n",
           static_cast<long long>(emulated::executed()));
  }
#endif
  printf("%d comparisons, %d failed\n", comparisons(), failures());
  return failures() != 0;
}

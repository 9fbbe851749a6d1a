#include "processor.h"

#include <unistd.h>

#if defined(MISTRAL_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#elif defined(MISTRAL_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mistral::cpu {
namespace {

int64_t l1_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  // If the system does not know the size, 32 KB is assumed, which is common.
  return bytes > 0 ? bytes : 32 << 10;
}

}  // namespace

const int64_t kL1Bytes = l1_bytes();

#if defined(MISTRAL_X86)
namespace {

// Whether the processor has AMX with bf16 and the operating system lets this process use it. This
// function asks the system for the permission. Without it AMX stays off, because tiles add 8 KB to
// what the system saves for each thread.
bool amx_permitted() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // cpuid leaf 7, edx
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  // The number of the request, ARCH_REQ_XCOMP_PERM, and that of the feature for which it asks,
  // XFEATURE_XTILEDATA.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool is_intel() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  return ebx == signature_INTEL_ebx && ecx == signature_INTEL_ecx && edx == signature_INTEL_edx;
}

// Clang 16 and GCC 10 do not know "f16c" as an argument of __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;  // cpuid leaf 7, subleaf 1, eax
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvxVnni);
}

}  // namespace

const bool kFetchesIntoL2 = is_intel();

bool processor_has(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::avxvnni: return processor_has(Isa::avx2) && has_avx_vnni();
    case Isa::avx512:
      return processor_has(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return processor_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::amx: {
      static const bool permitted = amx_permitted();
      return permitted && processor_has(Isa::avx512_bf16);
    }
    default: return false;
  }
}

#elif defined(MISTRAL_AARCH64)

const bool kFetchesIntoL2 = false;

bool processor_has(Isa isa) {
  unsigned long capabilities = 0, capabilities2 = 0;
#if defined(__linux__)
  capabilities = getauxval(AT_HWCAP);
  capabilities2 = getauxval(AT_HWCAP2);
#endif
  // HWCAP_ASIMDDP, HWCAP2_I8MM and HWCAP2_BF16 of asm/hwcap.h
  constexpr unsigned long kDotProduct = 1ul << 20, kI8mm = 1ul << 13, kBf16 = 1ul << 14;
  switch (isa) {
    case Isa::scalar:
    case Isa::neon: return true;
    case Isa::neon_dotprod: return capabilities & kDotProduct;
    case Isa::neon_bf16: return processor_has(Isa::neon_dotprod) && (capabilities2 & kBf16);
    case Isa::neon_i8mm: return processor_has(Isa::neon_bf16) && (capabilities2 & kI8mm);
    default: return false;
  }
}

#else

const bool kFetchesIntoL2 = false;

bool processor_has(Isa isa) { return isa == Isa::scalar; }

#endif

}  // namespace mistral::cpu

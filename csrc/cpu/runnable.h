// Which instruction sets this machine can run, of all those in isa.h, and which of these it runs best. CMakeLists.txt
// asks, too, to build for this machine.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstring>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mmk {

inline bool is_runnable(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == "avx2" || isa == "emulated") return avx2;
  if (isa == "avx512") return avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512_bf16") return avx512_bf16;
  if (isa == "amx") {  // as far as the CPU goes: csrc/cpu/amx.h asks the system
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kBoth = kBf16 | kTile;
    unsigned eax, ebx, ecx, edx;
    return avx512_bf16 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBoth) == kBoth;
  }
#elif defined(__aarch64__)
  if (isa == "neon") return true;
#if defined(__linux__)
  if (isa == "neon_bf16") return (getauxval(AT_HWCAP2) & (1ul << 14)) != 0;  // HWCAP2_BF16
#endif
#endif
  return false;
}

// Who made the CPU, as it says itself; empty where it does not.
inline std::string cpu_vendor() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0) return "";
  char name[12];
  std::memcpy(name, &ebx, 4);
  std::memcpy(name + 4, &edx, 4);
  std::memcpy(name + 8, &ecx, 4);
  return std::string(name, sizeof name);
#else
  return "";
#endif
}

// Whether pair products in lanes (vdpbf16ps) pay on a vendor's cores, in GF/s of one core against float32:
//   AMD Zen 4                225 : 112
//   Intel Emerald Rapids      88 : 182
// Those of a vendor that nobody has measured do: it would hardly have built them else.
inline bool pair_dots_pay(const std::string& vendor) { return vendor != "GenuineIntel"; }

// The best of instruction sets that a machine runs, lowest first: the last one, but for those that are for tests or
// lose to the one before on cores of this vendor. With tiles, products of bfloat16 that are worth it run on these.
inline std::string best_isa(const std::vector<std::string>& runnable, const std::string& vendor) {
  std::string best = "baseline";
  for (const std::string& isa : runnable) {
    const bool for_tests = isa == "emulated" || isa == "amx_portable";
    if (for_tests || (isa == "avx512_bf16" && !pair_dots_pay(vendor))) continue;
    best = isa;
  }
  return best;
}

}  // namespace mmk

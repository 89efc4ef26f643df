// Which instruction sets this machine can run, of all those in isa.h. CMakeLists.txt asks, too, to build for this
// machine.
#pragma once

#include <string>

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
  if (isa == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (isa == "neon") return true;
#if defined(__linux__)
  if (isa == "neon_bf16") return (getauxval(AT_HWCAP2) & (1ul << 14)) != 0;  // HWCAP2_BF16
#endif
#endif
  return false;
}

}  // namespace mmk

#include "csrc/cpu/isa.h"

#include <atomic>
#include <cstdlib>

namespace mmk {
namespace {

struct Support {
  const char* name;
  bool runnable;
};

#define MMK_ISA_NAME(name) #name,
constexpr const char* kNames[] = {MMK_FOR_EACH_ISA(MMK_ISA_NAME)};
#undef MMK_ISA_NAME
constexpr int kCount = static_cast<int>(Isa::count);

bool runnable(const std::string& name) {
  if (name == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (name == "avx2" || name == "emulated") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

int best() {
  int choice = 0;  // `baseline` is always compiled and comes first
  for (int i = 0; i < kCount; ++i) {
    if (std::string(kNames[i]) != "emulated" && runnable(kNames[i])) choice = i;
  }
  return choice;
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{best()};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

std::string current_isa() { return kNames[static_cast<int>(isa())]; }

std::vector<std::string> compiled_isas() { return {kNames, kNames + kCount}; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const char* name : kNames) {
    if (runnable(name)) names.emplace_back(name);
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i < kCount; ++i) {
    if (name == kNames[i] && runnable(name)) {
      chosen().store(i, std::memory_order_relaxed);
      return;
    }
    if (runnable(kNames[i])) known += (known.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument("mmkernels: instruction set '" + name +
                              "' is not available; this machine runs: " + known);
}

}  // namespace mmk

#include "csrc/cpu/isa.h"

#include <atomic>

#include "csrc/cpu/runnable.h"

namespace mmk {
namespace {

using Name = const char* (*)();
#define MMK_ISA_NAME(isa) isa::isa_name,
constexpr Name kNames[] = {MMK_FOR_EACH_ISA(MMK_ISA_NAME)};
#undef MMK_ISA_NAME
constexpr int kCount = static_cast<int>(Isa::count);

bool is_compiled(int i) { return kNames[i] != nullptr; }

bool is_supported(int i) { return is_compiled(i) && is_runnable(kNames[i]()); }

template <class Predicate>
std::vector<std::string> names_of(Predicate chosen) {
  std::vector<std::string> names;
  for (int i = 0; i < kCount; ++i) {
    if (chosen(i)) names.emplace_back(kNames[i]());
  }
  return names;
}

int best() {
  int choice = 0;  // `baseline` is always compiled and comes first
  for (int i = 0; i < kCount; ++i) {
    if (is_supported(i) && std::string(kNames[i]()) != "emulated") choice = i;
  }
  return choice;
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{best()};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

std::string current_isa() { return kNames[static_cast<int>(isa())](); }

std::vector<std::string> compiled_isas() { return names_of(is_compiled); }

std::vector<std::string> supported_isas() { return names_of(is_supported); }

void set_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i < kCount; ++i) {
    if (!is_supported(i)) continue;
    if (name == kNames[i]()) {
      chosen().store(i, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kNames[i]());
  }
  throw std::invalid_argument("mmkernels: instruction set '" + name +
                              "' is not available; this machine runs: " + known);
}

}  // namespace mmk

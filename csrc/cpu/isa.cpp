#include "csrc/cpu/isa.h"

#include <atomic>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/runnable.h"

namespace mmk {

constinit __thread TileThread tile_thread = {TileUnit::none, 0};
bool tiles_were_chosen = false;

namespace {

using Name = const char* (*)();
#define MMK_ISA_NAME(isa) isa::isa_name,
constexpr Name kNames[] = {MMK_FOR_EACH_ISA(MMK_ISA_NAME)};
#undef MMK_ISA_NAME
constexpr int kCount = static_cast<int>(Isa::count);

// What can be asked for: the kernels of an instruction set, and what they multiply pairs of bfloat16 on.
struct Choice {
  std::string name;
  Isa kernels;
  TileUnit tiles;
};

bool is_compiled(int i) { return kNames[i] != nullptr; }
bool is_supported(int i) { return is_compiled(i) && is_runnable(kNames[i]()); }

// Lowest first.
template <class Predicate>
std::vector<Choice> choices(Predicate chosen, [[maybe_unused]] bool with_amx) {
  std::vector<Choice> all;
  for (int i = 0; i < kCount; ++i) {
    if (chosen(i)) all.push_back({kNames[i](), static_cast<Isa>(i), TileUnit::none});
  }
#if defined(__x86_64__)
  constexpr int kBf16 = static_cast<int>(Isa::avx512_bf16);
  if (chosen(kBf16) && with_amx) all.push_back({"amx", Isa::avx512_bf16, TileUnit::amx});
#ifdef MMK_TEST_ISA
  // The kernels that tiles have, or where the CPU cannot run these, their emulation.
  for (Isa kernels : {Isa::avx512_bf16, Isa::emulated}) {
    if (!chosen(static_cast<int>(kernels))) continue;
    all.push_back({"amx_portable", kernels, TileUnit::portable});
    break;
  }
#endif
#endif
  return all;
}

std::vector<Choice> supported() { return choices(is_supported, why_no_amx().empty()); }

std::vector<std::string> names_of(const std::vector<Choice>& choices) {
  std::vector<std::string> names;
  for (const Choice& choice : choices) names.push_back(choice.name);
  return names;
}

// One number, so that kernels and tiles change together.
int packed(const Choice& x) { return static_cast<int>(x.kernels) | static_cast<int>(x.tiles) << 8; }

void allow_tiles(const Choice& x) {
  if (x.tiles != TileUnit::none) __atomic_store_n(&tiles_were_chosen, true, __ATOMIC_RELAXED);
}

int best() {
  const std::vector<Choice> all = supported();
  const std::string name = best_isa(names_of(all), cpu_vendor());
  for (const Choice& choice : all) {
    if (choice.name != name) continue;
    allow_tiles(choice);
    return packed(choice);
  }
  return 0;  // `baseline` is always compiled and comes first
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{best()};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed) & 0xff); }

TileUnit tile_unit() { return static_cast<TileUnit>(chosen().load(std::memory_order_relaxed) >> 8); }

std::string current_isa() {
  const int value = chosen().load(std::memory_order_relaxed);
  for (const Choice& choice : supported()) {
    if (packed(choice) == value) return choice.name;
  }
  return "baseline";
}

std::vector<std::string> compiled_isas() {
#ifdef MMK_AMX
  return names_of(choices(is_compiled, true));
#else
  return names_of(choices(is_compiled, false));
#endif
}

std::vector<std::string> supported_isas() { return names_of(supported()); }

void set_isa(const std::string& name) {
  std::string known;
  for (const Choice& choice : supported()) {
    if (name == choice.name) {
      allow_tiles(choice);
      chosen().store(packed(choice), std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + choice.name;
  }
  throw std::invalid_argument("mmkernels: instruction set '" + name +
                              "' is not available; this machine runs: " + known);
}

}  // namespace mmk

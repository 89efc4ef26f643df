// Which instruction sets the kernels were compiled for, which this machine can run, and which one runs.
//
// A kernel source `*.isa.cpp` is compiled once per instruction set; everything in it lives in `mmk::<isa>`, so that
// no function compiled for one set can be chosen by the linker for another. A library may be linked without the kernels
// of some of the sets below: they are declared weak, and null where they are absent.
//
// `amx` is the kernels of avx512_bf16 with their products of bfloat16 pairs on tiles (csrc/cpu/tiles.h), and
// `amx_portable`, in test builds, the same on tiles in plain C++.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cpu/tile_unit.h"

namespace mmk {

// Lowest first; the highest one that is there and that the machine supports runs unless another is asked for.
#if defined(__x86_64__)
#define MMK_FOR_EACH_ISA(X, ...)         \
  X(baseline __VA_OPT__(, ) __VA_ARGS__) \
  X(avx2 __VA_OPT__(, ) __VA_ARGS__)     \
  X(avx512 __VA_OPT__(, ) __VA_ARGS__)   \
  X(avx512_bf16 __VA_OPT__(, ) __VA_ARGS__) X(emulated __VA_OPT__(, ) __VA_ARGS__)
#elif defined(__aarch64__)
#define MMK_FOR_EACH_ISA(X, ...)         \
  X(baseline __VA_OPT__(, ) __VA_ARGS__) \
  X(neon __VA_OPT__(, ) __VA_ARGS__)     \
  X(neon_bf16 __VA_OPT__(, ) __VA_ARGS__)
#else
#define MMK_FOR_EACH_ISA(X, ...) X(baseline __VA_OPT__(, ) __VA_ARGS__)
#endif

#define MMK_ISA_ENUM(name) name,
enum class Isa : int { MMK_FOR_EACH_ISA(MMK_ISA_ENUM) count };
#undef MMK_ISA_ENUM

Isa isa();             // whose kernels run
TileUnit tile_unit();  // what these multiply pairs on
std::string current_isa();
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();
void set_isa(const std::string& name);  // throws std::invalid_argument for a name not in supported_isas()

// MMK_KERNEL(result, function, arguments...) declares a function that every instruction set compiles for itself, and
// MMK_DISPATCH(function) is that of the one in use.
#if defined(MMK_ISA) || !(defined(__x86_64__) || defined(__aarch64__))
#define MMK_MAYBE_ABSENT
#else
#define MMK_MAYBE_ABSENT __attribute__((weak))
#endif
#define MMK_KERNEL_IN(isa, result, function, ...) \
  namespace isa {                                 \
  MMK_MAYBE_ABSENT result function(__VA_ARGS__);  \
  }
#define MMK_KERNEL(result, function, ...) \
  MMK_FOR_EACH_ISA(MMK_KERNEL_IN, result, function, __VA_ARGS__) static_assert(true)

#define MMK_KERNEL_CASE(isa, function) \
  case ::mmk::Isa::isa:                \
    return ::mmk::isa::function;
#define MMK_DISPATCH(function)                              \
  [] {                                                      \
    switch (::mmk::isa()) {                                 \
      MMK_FOR_EACH_ISA(MMK_KERNEL_CASE, function)           \
      case ::mmk::Isa::count:                               \
        break;                                              \
    }                                                       \
    throw std::logic_error("no instruction set is in use"); \
  }()

MMK_KERNEL(const char*, isa_name);

}  // namespace mmk

// Which instruction sets the kernels were compiled for, which this machine can run, and which one runs.
//
// A kernel source `*.isa.cpp` is compiled once per instruction set; everything in it lives in `mmk::<isa>`, so that
// no function compiled for one set can be chosen by the linker for another.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace mmk {

// Lowest first; the highest one that the machine supports runs unless another is asked for.
#define MMK_ISA_ENUM(name) name,
enum class Isa : int { MMK_FOR_EACH_ISA(MMK_ISA_ENUM) count };
#undef MMK_ISA_ENUM

Isa isa();
std::string current_isa();
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();
void set_isa(const std::string& name);  // throws std::invalid_argument for a name not in supported_isas()

}  // namespace mmk

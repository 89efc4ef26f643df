// Whether this process may use the CPU's tiles. Linux grants that to a process that asks; what runs kernels in a
// sandbox may refuse.
#pragma once

#include <string>

namespace mmk {

// Empty where tiles can be used, else the reason why not. `refused` is what the system answered, 0 being consent.
std::string why_no_amx(bool compiled, bool cpu_has_it, int refused);

// The same of this process, which asks once.
const std::string& why_no_amx();

}  // namespace mmk

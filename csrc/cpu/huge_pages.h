// Huge pages behind large fresh memory, whose first touch otherwise costs a page fault for every 4 KB.
#pragma once

#include <cstddef>

namespace mmk {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWorthHugePages = size_t{4} << 20;

// Asks for them in the whole huge pages inside the memory; where the system has none to give, nothing happens.
void ask_for_huge_pages(void* data, size_t bytes);

}  // namespace mmk

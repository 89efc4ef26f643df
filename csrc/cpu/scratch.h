// The memory of one call, which the thread keeps for its next one: what is freed may go back to the system, and then
// every call would pay its page faults anew.
#pragma once

#include <cstddef>

namespace mmk {

struct ScratchBlock {
  float* data = nullptr;  // 64-byte aligned, never initialised
  size_t bytes = 0;
};

// At least as many bytes; throws std::bad_alloc.
ScratchBlock take_scratch(size_t bytes);

// Some blocks of at most a few MB are kept, unless MMKERNELS_KEEP_SCRATCH is 0, as in tests that watch fresh memory.
void give_back_scratch(ScratchBlock block) noexcept;

}  // namespace mmk

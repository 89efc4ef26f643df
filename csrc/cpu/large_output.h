// The memory of large results: what first touching it costs, and whether it should pass through the caches.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/mman.h>

#include <cstdint>

namespace mmk {

// Results of this size would push everything else out of a core's share of the caches.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;
inline bool worth_streaming(int64_t bytes) { return bytes >= kStreamedBytes; }

// Asks for huge pages behind a large fresh tensor, whose first touch otherwise costs a page fault for every 4 KB. Only
// whole huge pages inside the tensor are named; where the system has none to give, nothing happens.
inline const at::Tensor& with_huge_pages(const at::Tensor& fresh) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr size_t kLarge = size_t{4} << 20;
  if (fresh.nbytes() >= kLarge) {
    const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1),
                    last = (begin + fresh.nbytes()) & ~(kHugePage - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace mmk

// The memory of large results: what first touching it costs, and whether it should pass through the caches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "csrc/cpu/huge_pages.h"

namespace mmk {

// Results of this size would push everything else out of a core's share of the caches.
constexpr int64_t kStreamedBytes = int64_t{2} << 20;
inline bool worth_streaming(int64_t bytes) { return bytes >= kStreamedBytes; }

// The tensor itself.
inline const at::Tensor& with_huge_pages(const at::Tensor& fresh) {
  if (fresh.nbytes() >= kWorthHugePages) ask_for_huge_pages(fresh.data_ptr(), fresh.nbytes());
  return fresh;
}

}  // namespace mmk

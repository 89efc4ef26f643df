#pragma once

#include <cstdint>

namespace mmk {

enum class Dtype : int8_t { f32, bf16, f16, boolean };

// Inlined always, so that no instruction set's copy of it can stand in for another's.
[[gnu::always_inline]] constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : dtype == Dtype::boolean ? 1 : 2;
}

}  // namespace mmk

// Rows of a concatenation, normalised.
#pragma once

#include "csrc/concat_norm_linear/statistics.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// x̂ ∘ gain + shift of `width` elements, zero up to a whole vector; rounded to bfloat16 for pairs. Neither gain nor
// shift given: x̂ itself; both must be readable to a whole vector.
template <bool kPairs>
MMK_INLINE void normalize_row(Dtype dtype, const void* row, int64_t width, Statistics s, const float* gain,
                              const float* shift, float* to) {
  const vf mean = set1(s.mean), rstd = set1(s.rstd);
  const auto put = [&](int64_t k, vf x) {
    if constexpr (kPairs) {
      store_from_float(reinterpret_cast<Bf16*>(to) + k, x);
    } else {
      store(to + k, x);
    }
  };
  with_element_type(dtype, row, [&](const auto* x) {
    const auto normalized = [&](vf value, int64_t k) {
      vf y = (value - mean) * rstd;
      if (gain != nullptr) y = shift == nullptr ? y * load(gain + k) : fma(y, load(gain + k), load(shift + k));
      return y;
    };
    int64_t k = 0;
    for (; k + VW <= width; k += VW) put(k, normalized(load_as_float(x + k), k));
    if (k < width) {
      alignas(64) float tail[VW];
      store(tail, normalized(load_as_float(x + k, width - k), k));
      put(k, load_partial(tail, width - k));
      k += VW;
    }
    if (kPairs && (k / VW) % 2 != 0) put(k, zero());
  });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// Rows of a concatenation, normalised.
#pragma once

#include "csrc/concat/product.h"
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

struct Part {
  int64_t first, count, column, width;  // of the rows of a source
};

// Packs part of a source, normalised as by normalize_row, in panels of columns for products over its rows; `statistics`
// of all rows, gain and shift from the first column on.
template <bool kPairs>
void pack_normalized_columns(const ConcatSources& sources, int64_t s, const float* statistics, const Part& part,
                             const float* gain, const float* shift, float* panels) {
  const int64_t depth = units<kPairs>(part.count), bytes = element_size(sources.dtype);
  const auto address = [&](int64_t i) {
    return row_address(sources.items[s].x, sources.dtype, part.first + i) + part.column * bytes;
  };
  const auto of_row = [&](int64_t i) {
    return Statistics{statistics[2 * (part.first + i)], statistics[2 * (part.first + i) + 1]};
  };
  if constexpr (kPairs) {
    constexpr int64_t kRows = 32;  // even, so that pairs of rows stay together
    alignas(64) float rows[kRows * kGroup / 2];
    for (int64_t i = 0; i < part.count; i += kRows) {
      const int64_t n = min(kRows, part.count - i);
      for (int64_t r = 0; r < n; ++r) {
        normalize_row<true>(sources.dtype, address(i + r), part.width, of_row(i + r), gain, shift,
                            rows + r * kGroup / 2);
      }
      for (int64_t c = 0; c < part.width; c += kPanel) {
        pack_columns_as_pairs(reinterpret_cast<const uint16_t*>(rows) + c, kGroup, n, min(kPanel, part.width - c),
                              panels + c * depth + i / 2 * kPanel, kPanel);
      }
    }
  } else {
    for (int64_t i = 0; i < part.count; ++i) {
      for (int64_t c = 0; c < part.width; c += kPanel) {
        normalize_row<false>(sources.dtype, address(i) + c * bytes, min(kPanel, part.width - c), of_row(i),
                             gain == nullptr ? nullptr : gain + c, shift == nullptr ? nullptr : shift + c,
                             panels + c * depth + i * kPanel);
      }
    }
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

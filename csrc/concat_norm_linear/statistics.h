// Mean and 1/standard deviation of the rows of a concatenation, in float32: the mean first, then the deviations from
// it, whose own mean corrects it. A row is read twice, the second time from cache.
#pragma once

#include "csrc/concat/product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

struct Statistics {
  float mean, rstd;
};

// The sum of f(x) over a row of `width` elements; f of the zeros behind it must be zero, or `rest` fewer are summed.
template <class T, class Function>
MMK_INLINE vf sum_row(const T* x, int64_t width, Function f) {
  vf sums[4] = {zero(), zero(), zero(), zero()};
  int64_t k = 0;
  for (; k + 4 * VW <= width; k += 4 * VW) {
    MMK_UNROLL for (int j = 0; j < 4; ++j) sums[j] = sums[j] + f(load_as_float(x + k + j * VW));
  }
  for (; k + VW <= width; k += VW) sums[0] = sums[0] + f(load_as_float(x + k));
  vf total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (k < width) {  // the lanes behind the row count nothing
    alignas(64) float tail[VW];
    store(tail, f(load_as_float(x + k, width - k)));
    total = total + load_partial(tail, width - k);
  }
  return total;
}

// Adds the deviations from `center` of a row, and their squares.
template <class T>
MMK_INLINE void sum_deviations(const T* x, int64_t width, vf center, vf& deviations, vf& squares) {
  vf d[2] = {zero(), zero()}, q[2] = {zero(), zero()};
  const auto add = [&](int j, vf deviation) {
    d[j] = d[j] + deviation;
    q[j] = fma(deviation, deviation, q[j]);
  };
  int64_t k = 0;
  for (; k + 2 * VW <= width; k += 2 * VW) {
    add(0, load_as_float(x + k) - center);
    add(1, load_as_float(x + k + VW) - center);
  }
  for (; k + VW <= width; k += VW) add(0, load_as_float(x + k) - center);
  if (k < width) {  // the lanes behind the row count nothing
    alignas(64) float tail[VW];
    store(tail, load_as_float(x + k, width - k) - center);
    add(0, load_partial(tail, width - k));
  }
  deviations = deviations + (d[0] + d[1]);
  squares = squares + (q[0] + q[1]);
}

inline Statistics row_statistics(const ConcatSources& sources, int64_t row, bool rms, float eps) {
  const auto columns = static_cast<float>(max(1, sources.columns));
  const auto sum_all = [&](auto f) {
    vf total = zero();
    for (int64_t s = 0; s < sources.count; ++s) {
      with_element_type(sources.dtype, row_address(sources.items[s].x, sources.dtype, row),
                        [&](const auto* x) { total = total + sum_row(x, sources.items[s].width, f); });
    }
    return sum(total);
  };
  if (rms) return {0.f, 1.f / std::sqrt(sum_all([](vf x) { return x * x; }) / columns + eps)};
  const float near = sum_all([](vf x) { return x; }) / columns;
  const vf center = set1(near);
  vf deviations = zero(), squares = zero();
  for (int64_t s = 0; s < sources.count; ++s) {
    with_element_type(sources.dtype, row_address(sources.items[s].x, sources.dtype, row),
                      [&](const auto* x) { sum_deviations(x, sources.items[s].width, center, deviations, squares); });
  }
  const float shift = sum(deviations) / columns, spread = sum(squares) / columns;
  return {near + shift, 1.f / std::sqrt(std::fmax(0.f, spread - shift * shift) + eps)};
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

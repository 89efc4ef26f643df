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

// f(j, x) for the vectors of a row in some order, in turns of two (j) so that each has sums of its own; and for what is
// left behind the last whole vector, f(0, x) with `fill` in the lanes behind it.
template <class T, class Function>
MMK_INLINE void for_row_vectors(const T* x, int64_t width, vf fill, Function f) {
  int64_t k = 0;
  for (; k + 2 * VW <= width; k += 2 * VW) {
    if constexpr (std::is_same_v<T, Bf16>) {  // one load for two vectors, cheaper to take apart than to widen
      const vf pairs = load_pairs(&x[k].bits);
      f(0, low_bf16(pairs));
      f(1, high_bf16(pairs));
    } else {
      f(0, load_as_float(x + k));
      f(1, load_as_float(x + k + VW));
    }
  }
  for (; k + VW <= width; k += VW) f(0, load_as_float(x + k));
  if (k < width) {
    alignas(64) float tail[VW];
    store(tail, fill);
    store_from_float(tail, load_as_float(x + k, width - k), width - k);
    f(0, load(tail));
  }
}

template <class T>
MMK_INLINE vf sum_row(const T* x, int64_t width) {
  vf sums[2] = {zero(), zero()};
  if constexpr (kBf16Dot && std::is_same_v<T, Bf16>) {
    const vf ones = pair(set1(1.f), set1(1.f));
    int64_t k = 0;
    for (; k + 4 * VW <= width; k += 4 * VW) {
      sums[0] = pair_dot(sums[0], load_pairs(&x[k].bits), ones);
      sums[1] = pair_dot(sums[1], load_pairs(&x[k + 2 * VW].bits), ones);
    }
    for (; k < width; k += 2 * VW) sums[0] = pair_dot(sums[0], load_pairs(&x[k].bits, width - k), ones);
  } else {
    for_row_vectors(x, width, zero(), [&](int j, vf v) { sums[j] = sums[j] + v; });
  }
  return sums[0] + sums[1];
}

template <class T>
MMK_INLINE vf sum_squares(const T* x, int64_t width) {
  vf sums[2] = {zero(), zero()};
  for_row_vectors(x, width, zero(), [&](int j, vf v) { sums[j] = fma(v, v, sums[j]); });
  return sums[0] + sums[1];
}

// Adds the deviations from `center` of a row, and their squares. Those of bfloat16 are not missed: float32 sums of its
// 8 digits round to less than a mean's last one until a row is far beyond 2^16 elements.
template <class T>
MMK_INLINE void sum_deviations(const T* x, int64_t width, vf center, vf& deviations, vf& squares) {
  vf d[2] = {zero(), zero()}, q[2] = {zero(), zero()};
  for_row_vectors(x, width, center, [&](int j, vf v) {
    const vf deviation = v - center;
    if constexpr (!std::is_same_v<T, Bf16>) d[j] = d[j] + deviation;
    q[j] = fma(deviation, deviation, q[j]);
  });
  deviations = deviations + (d[0] + d[1]);
  squares = squares + (q[0] + q[1]);
}

// Mean and rstd of `count` rows from `first` on, VW rows at a time: to[2 i], to[2 i + 1]. A row's do not depend on the
// others'.
inline void rows_statistics(const ConcatSources& sources, int64_t first, int64_t count, bool rms, float eps,
                            float* to) {
  const vf columns = set1(static_cast<float>(max(1, sources.columns)));
  with_element_type(sources.dtype, static_cast<const void*>(nullptr), [&](const auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    for (int64_t i = 0; i < count; i += VW) {
      const int64_t rows = min(VW, count - i);
      // f(y, width, x) for row y of each source.
      const auto for_rows = [&](auto f) {
        for (int64_t s = 0; s < sources.count; ++s) {
          const ConcatSource& source = sources.items[s];
          for_row_addresses(source.x, sources.dtype, first + i, rows,
                            [&](int64_t y, const char* x) { f(y, source.width, reinterpret_cast<const T*>(x)); });
        }
      };
      vf mean = zero(), variance, sums[VW] = {}, squares[VW] = {};
      if (rms) {
        for_rows([&](int64_t y, int64_t width, const T* x) { squares[y] = squares[y] + sum_squares(x, width); });
        variance = sum_rows(squares) / columns;
      } else {
        for_rows([&](int64_t y, int64_t width, const T* x) { sums[y] = sums[y] + sum_row(x, width); });
        const vf near = sum_rows(sums) / columns;
        alignas(64) float centers[VW];
        store(centers, near);
        for (vf& x : sums) x = zero();
        for_rows([&](int64_t y, int64_t width, const T* x) {
          sum_deviations(x, width, set1(centers[y]), sums[y], squares[y]);
        });
        const vf shift = sum_rows(sums) / columns, spread = sum_rows(squares) / columns;
        mean = near + shift;
        variance = max(zero(), spread - shift * shift);
      }
      alignas(64) float means[VW], rstds[VW];
      store(means, mean);
      store(rstds, set1(1.f) / sqrt(variance + set1(eps)));
      for (int64_t y = 0; y < rows; ++y) {
        to[2 * (i + y)] = means[y];
        to[2 * (i + y) + 1] = rstds[y];
      }
    }
  });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

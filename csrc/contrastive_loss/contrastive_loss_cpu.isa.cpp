//   z = scale · x yᵀ,   p_ij = w_i exp(z_ij) / Σ_j exp(z_ij) + w_j exp(z_ij) / Σ_i exp(z_ij)
//   gradient of the logits: p_ij − c (share_i + share_j) [ij positive] − s
//
// Tiling     of a tile of products: a row at a time for what a row needs; for the columns' sums kColumns vectors of
// them
//            down all rows, twice, the first time for the maximum.
// Threads    the caller's: a tile belongs to one.
// Precision  float32; a softmax is of the distance from the largest product, exact before it is scaled.
// Limits     any number of columns.
#include "csrc/contrastive_loss/contrastive_loss.h"
#include "csrc/logits/softmax.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kColumns = 4;  // vectors

// f(column) for the positives of a row.
template <class Function>
MMK_INLINE void for_positives(const ContrastiveTile& p, int64_t row, Function f) {
  const PairTile& t = p.pairs;
  if (p.row_labels == nullptr) {
    const int64_t target = t.target(row);
    if (target >= 0 && target < t.columns) f(target);
    return;
  }
  const int64_t label = p.row_labels[t.first_row + row];
  for (int64_t c = 0; c < t.columns; ++c) {
    if (p.column_labels[c] == label) f(c);
  }
}

MMK_INLINE float first_lane(vf x) {
  alignas(64) float lanes[VW];
  store(lanes, x);
  return lanes[0];
}

MMK_INLINE float share_of(const ContrastiveTile& p, int64_t row, int64_t column) {
  const float of_row = p.row_share == nullptr ? 1.f : p.row_share[p.pairs.first_row + row];
  if (p.of_columns.top == nullptr) return of_row;
  return of_row + (p.column_share == nullptr ? 1.f : p.column_share[column]);
}

template <class T>
void row_statistics(const ContrastiveTile& p, const T* products, int64_t row) {
  const PairTile& t = p.pairs;
  const int64_t at = t.first_row + row;
  const SoftmaxRow softmax = softmax_row(products, t.columns, t.scale);
  p.of_rows.top[at] = softmax.top;
  p.of_rows.total[at] = softmax.total;
  double targets = 0.;
  for_positives(p, row, [&](int64_t c) {
    targets += static_cast<double>(share_of(p, row, c)) * static_cast<double>(sum(load_as_float(products + c, 1)));
  });
  p.targets[at] = targets;
  vf total = zero();
  for (int64_t c = 0; c < t.columns; c += VW) total = total + load_as_float(products + c, t.columns - c);
  p.sums[at] = sum(total);
}

template <int kVectors, class T>
MMK_INLINE void column_statistics(const ContrastiveTile& p, const T* products, int64_t c) {
  const PairTile& t = p.pairs;
  const int64_t n = t.columns - c;
  const vf factor = set1(t.scale * kLog2e);
  vf top[kVectors], total[kVectors];
  MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
    vf most = load_as_float(p.of_columns.top + c + j * VW, n - j * VW);
    const vf before = most;
    for (int64_t row = 0; row < t.rows; ++row)
      most = max(load_as_float(products + row * t.stride + c + j * VW, n - j * VW), most);
    top[j] = most;
    total[j] = load_as_float(p.of_columns.total + c + j * VW, n - j * VW) * exp_scaled(before - most, factor);
  }
  for (int64_t row = 0; row < t.rows; ++row) {
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
      const vf x = load_as_float(products + row * t.stride + c + j * VW, n - j * VW);
      total[j] = total[j] + exp_scaled(x - top[j], factor);
    }
  }
  MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
    store_from_float(p.of_columns.top + c + j * VW, top[j], n - j * VW);
    store_from_float(p.of_columns.total + c + j * VW, total[j], n - j * VW);
  }
}

template <class T>
void row_gradients(const ContrastiveTile& p, T* products, int64_t row) {
  const PairTile& t = p.pairs;
  const int64_t at = t.first_row + row;
  const bool symmetric = p.of_columns.top != nullptr;
  const vf factor = set1(t.scale * kLog2e), top = set1(p.of_rows.top[at]), smoothed = set1(p.of_all);
  const vf weight = set1(p.row_weight[at] / p.of_rows.total[at]);
  // Of the columns from c on, no positive being among them.
  const auto gradient_of = [&](vf x, int64_t c, int64_t n) __attribute__((always_inline)) {
    const vf of_row = fma(exp_scaled(x - top, factor), weight, zero() - smoothed);
    if (!symmetric) return of_row;
    const vf of_column = exp_scaled(x - load_as_float(p.of_columns.top + c, n), factor);
    return fma(of_column, load_as_float(p.column_weight + c, n), of_row);
  };
  // Positives are the differences of two numbers near each other: made before anything is rounded.
  double of_positives = 0.;
  for_positives(p, row, [&](int64_t c) {
    const vf x = load_as_float(products + c, 1);
    const float share = p.of_positive * share_of(p, row, c);
    p.of_positives[c] = first_lane(gradient_of(x, c, 1)) - share;
    of_positives += static_cast<double>(share) * static_cast<double>(sum(x));
  });
  vf with_products = zero();
  for_logits<kColumns>(t.columns, [&](int64_t first, auto vectors) __attribute__((always_inline)) {
    MMK_UNROLL for (int j = 0; j < decltype(vectors)::value; ++j) {
      const int64_t c = first + j * VW, n = t.columns - c;
      // Behind the row, where products are 0, an exponential of the distance from the top may be infinite.
      const vf x = load_as_float(products + c, n), gradient = filled_from(n, gradient_of(x, c, n), 0.f);
      with_products = fma(gradient, x, with_products);
      store_from_float(products + c, gradient, n);
    }
  });
  for_positives(p, row, [&](int64_t c) { store_from_float(products + c, set1(p.of_positives[c]), 1); });
  p.of_scale[at] = static_cast<double>(sum(with_products)) - of_positives;
  std::memset(static_cast<void*>(products + t.columns), 0, sizeof(T) * static_cast<size_t>(t.end_column - t.columns));
}

}  // namespace

void contrastive_statistics(const ContrastiveTile& p) {
  const PairTile& t = p.pairs;
  with_element_type(t.dtype, static_cast<const void*>(t.products), [&](const auto* products) {
    for (int64_t row = 0; row < t.rows; ++row) row_statistics(p, products + row * t.stride, row);
    if (p.of_columns.top == nullptr) return;
    for_logits<kColumns>(t.columns, [&](int64_t c, auto vectors) __attribute__((always_inline)) {
      column_statistics<decltype(vectors)::value>(p, products, c);
    });
  });
}

void contrastive_gradients(const ContrastiveTile& p) {
  const PairTile& t = p.pairs;
  with_element_type(t.dtype, t.products, [&](auto* products) {
    for (int64_t row = 0; row < t.rows; ++row) row_gradients(p, products + row * t.stride, row);
    for (int64_t row = t.rows; row < t.end_row; ++row) {
      std::memset(static_cast<void*>(products + row * t.stride), 0,
                  sizeof(*products) * static_cast<size_t>(t.end_column));
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk

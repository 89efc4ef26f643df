// Products whose result has features in its vectors: P·V, dS·K, Pᵀ·dO, dSᵀ·Q, with what happens to a tile at its end.
#pragma once

#include "csrc/attention/pack.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Where rows of results go: converted to the dtype, features beyond the last never written.
struct Destination {
  void* data;
  Dtype dtype;
  int64_t stride, features;

  // Whether a product can be stored there as it is, in whole vectors.
  bool takes_products() const { return features % VW == 0; }
};

// Factors that change nothing, for as many rows as a product may have.
constexpr struct Ones {
  float values[128];
  constexpr Ones() : values() {
    for (float& x : values) x = 1.f;
  }
} kOnes;

// What becomes of a product: rows of `to` = finish · (old_factor · from + factor · A·B), converted to its dtype. finish
// and old_factor are one number per row, or null: no such factor, no such term.
struct Epilogue {
  float factor;
  const float* old_factor;
  const float* from;
  int64_t from_stride;
  const float* finish;
  void* to;
  int64_t to_stride;
  Dtype to_dtype = Dtype::f32;
};

template <class T, int MR, int NR>
MMK_INLINE void store_tile(T* to, int64_t stride, const vf (&acc)[MR][NR]) {
  MMK_UNROLL for (int r = 0; r < MR; ++r) {
    MMK_UNROLL for (int j = 0; j + 1 < NR; j += 2) {
      write_pair<false>(to + r * stride + j * VW, acc[r][j], acc[r][j + 1]);
    }
    if constexpr (NR % 2 != 0) store_from_float(to + r * stride + (NR - 1) * VW, acc[r][NR - 1]);
  }
}

template <bool kPairs, int MR, int NR, class RowStride, class KStride>
MMK_NOINLINE void feature_tile(const float* a, RowStride row_stride, KStride k_stride, Panel columns, int64_t depth,
                               const Epilogue& e, int64_t row, int64_t column) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, a, row_stride, k_stride, columns.data + column, columns.stride, depth);
  if (e.factor != 1.f) {
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      MMK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = acc[r][j] * set1(e.factor);
    }
  }
  if (e.old_factor != nullptr) {
    const float* from = e.from + row * e.from_stride + column;
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const vf factor = set1(e.old_factor[row + r]);
      MMK_UNROLL for (int j = 0; j < NR; ++j) {
        acc[r][j] = fma(factor, load(from + r * e.from_stride + j * VW), acc[r][j]);
      }
    }
  }
  if (e.finish != nullptr) {
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const vf factor = set1(e.finish[row + r]);
      MMK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = acc[r][j] * factor;
    }
  }
  const int64_t at = row * e.to_stride + column;
  if (e.to_dtype == Dtype::f32) {
    store_tile(static_cast<float*>(e.to) + at, e.to_stride, acc);
  } else if (e.to_dtype == Dtype::bf16) {
    store_tile(static_cast<Bf16*>(e.to) + at, e.to_stride, acc);
  } else {
    store_tile(static_cast<F16*>(e.to) + at, e.to_stride, acc);
  }
}

// A[rows][depth] · columns[depth][features], A having the given strides.
template <bool kPairs, class RowStride, class KStride>
void multiply_features(const float* a, RowStride row_stride, KStride k_stride, int64_t rows, Panel columns,
                       int64_t depth, int64_t features, const Epilogue& e) {
  for_runs<kFeatureVectors>(ceil_div(features, VW), [&](auto vectors, int64_t v) {
    for_runs<kFeatureRows>(rows, [&](auto run, int64_t i) {
      feature_tile<kPairs, static_cast<int>(run), static_cast<int>(vectors)>(a + i * row_stride, row_stride, k_stride,
                                                                             columns, depth, e, i, v * VW);
    });
  });
}

// to[i] = factor[i] · from[i] for count rows; no factor, no product.
inline void store_rows(const Destination& to, const float* from, int64_t stride, int64_t count, const float* factor) {
  with_element_type(to.dtype, to.data, [&](auto* p) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < to.features; c += VW) {
        const vf x = load(from + i * stride + c);
        store_from_float(p + i * to.stride + c, factor == nullptr ? x : x * set1(factor[i]), to.features - c);
      }
    }
  });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

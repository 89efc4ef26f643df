// Products whose result has features in its vectors: P·V, dS·K, Pᵀ·dO, dSᵀ·Q, with what happens to a tile at its end.
#pragma once

#include "csrc/attention/pack.h"

namespace mmk {
namespace MMK_ISA {

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

// A[rows][depth] · columns[depth][features], one of A's strides being 1. Columns that are turned are for an A whose
// rows lie in lanes, row_stride being 1, and are multiplied on tiles.
void multiply_features(bool pairs, const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, Panel columns,
                       int64_t depth, int64_t features, const Epilogue& e);

// The same on tiles, left as it comes, with the rows of the result in its lanes: to[features][lanes] = (A·B)ᵀ, or what
// it holds and that. Features are completed to whole vectors.
void multiply_turned_features(const float* a, int64_t stride, int64_t vectors, Panel columns, int64_t depth,
                              int64_t features, bool adds, float* to, int64_t to_stride);
// Its first `count` lanes, times a factor each, as rows of bfloat16.
void store_lanes(const float* from, int64_t stride, int64_t count, int64_t features, const float* factor, void* to,
                 int64_t to_stride);
// Both, for a product that is the whole sum: a block of it at a time, while that is in level-1 cache.
void store_turned_features(const float* a, int64_t stride, int64_t count, Panel columns, int64_t depth,
                           int64_t features, const float* factor, void* to, int64_t to_stride);

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

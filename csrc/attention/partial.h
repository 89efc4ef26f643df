// Results over a part of the keys, and their union.
#pragma once

#include "csrc/attention/product.h"
#include "csrc/attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Σ exp(S - row_max) V, row_max and Σ exp(S - row_max) of some rows over some of the keys.
struct Partial {
  float *total, *row_max, *sum;

  static int64_t floats(int64_t rows, int64_t stride) { return rows * (stride + 2); }
  static Partial at(float* memory, int64_t rows, int64_t stride) {
    return {memory, memory + rows * stride, memory + rows * (stride + 1)};
  }
};

// The union of `count` partials, added up in order. NaN in one of them stays NaN.
inline void merge_partials(const Partial* parts, int64_t count, int64_t rows, int64_t stride, const Partial& out) {
  for (int64_t i = 0; i < rows; ++i) {
    float row_max = parts[0].row_max[i];
    for (int64_t c = 1; c < count; ++c) {
      const float other = parts[c].row_max[i];
      if (!(other <= row_max)) row_max = other;
    }
    float sum = 0.f;
    float* total = out.total + i * stride;
    std::memset(total, 0, sizeof(float) * static_cast<size_t>(stride));
    for (int64_t c = 0; c < count; ++c) {
      const float factor = factor_of_older(parts[c].row_max[i], row_max);
      sum += factor * parts[c].sum[i];
      for (int64_t x = 0; x < stride; x += VW) {
        store(total + x, fma(set1(factor), load(parts[c].total + i * stride + x), load(total + x)));
      }
    }
    out.row_max[i] = row_max;
    out.sum[i] = sum;
  }
}

// 1 / Σ exp per row, 0 for a row that attends to nothing.
inline void invert_sums(const float* sum, int64_t count, float* inverse) {
  for (int64_t i = 0; i < count; ++i) inverse[i] = sum[i] == 0.f ? 0.f : 1.f / sum[i];
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

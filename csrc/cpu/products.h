// Products of blocks of rows that fit a core's cache, for ops made of several of them:
//
//   multiply      C[i, :] = Σ_k A[i, k] · B[k, :]    B's rows in vectors, A one unit at a time in any layout
//   dot_rows      C[i, j] = Σ_k A[i, k] · B[j, k]    rows of both in vectors, nothing packed, any number of rows
//
// Operands are packed as csrc/cpu/pack.h does it. A unit is a float or a pair of bfloat16 (csrc/cpu/pack.h); depths and
// strides of operands are counted in units. Sums are float32, in an order that depends on neither how the caller cuts
// rows and columns nor how many rows there are.
#pragma once

#include "csrc/cpu/pack.h"
#include "csrc/cpu/schedule.h"
#include "csrc/cpu/tile.h"

namespace mmk {
namespace MMK_ISA {

// What becomes of a tile: C = tile; C = C + tile; C = C · tile; or sum = sum + factor · C · tile.
enum class Combine { store, add, multiply, add_product };

struct Result {
  Combine how;
  float* data;  // C
  int64_t stride;
  float* sum = nullptr;  // add_product alone, of C's stride
  float factor = 1.f;
};

// A[rows][depth] · B[depth][columns]; one of A's strides is 1. B and C are read and written in whole vectors, up to a
// multiple of VW columns.
void multiply(bool pairs, const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, const float* b,
              int64_t ldb, int64_t depth, int64_t columns, const Result& c);

// partial [rows][ldp][VW] += A[rows][depth] · B[others][depth]ᵀ, one sum per lane; `finish_dots` adds the lanes up.
void dot_rows(bool pairs, const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t others,
              int64_t depth, float* partial, int64_t ldp);

namespace {

// Calls f(combine), where combine(vector, at) makes elements of C from `at` on of a vector of the tile.
template <class Function>
MMK_INLINE void with_combine(const Result& c, Function f) {
  switch (c.how) {
    case Combine::store:
      return f([&](vf x, int64_t at) { store(c.data + at, x); });
    case Combine::add:
      return f([&](vf x, int64_t at) { store(c.data + at, load(c.data + at) + x); });
    case Combine::multiply:
      return f([&](vf x, int64_t at) { store(c.data + at, load(c.data + at) * x); });
    case Combine::add_product:
      return f(
          [&](vf x, int64_t at) { store(c.sum + at, fma(set1(c.factor), load(c.data + at) * x, load(c.sum + at))); });
  }
}

// Floats [rows][columns] → units of two rows [units of rows][columns], in place; whole vectors of columns.
inline void pair_rows_in_place(float* data, int64_t stride, int64_t rows, int64_t columns) {
  if constexpr (kBf16Dot) {
    for (int64_t i = 0; i < rows; i += 2) {
      const float *low = data + i * stride, *high = low + stride;
      float* to = data + i / 2 * stride;
      for (int64_t c = 0; c < columns; c += VW) {
        store(to + c, pair(load(low + c), i + 1 < rows ? load(high + c) : zero()));
      }
    }
  }
}

// Floats [rows][columns] → units of two columns [rows][units of columns], in place, zeros up to a multiple of VW units.
inline void pair_columns_in_place(float* data, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = data + i * stride;
    for (int64_t c = 0; c < columns; c += 2 * VW) {
      const auto at = [&](int64_t k) { return k < columns ? load_partial(row + k, min(VW, columns - k)) : zero(); };
      const vf low = c + VW <= columns ? load(row + c) : at(c);
      const vf high = c + 2 * VW <= columns ? load(row + c + VW) : at(c + VW);
      store(row + c / 2, to_bf16(low, high));
    }
  }
}

// to[column] = Σ_rows of [rows][columns] floats, in blocks of rows so that a long sum keeps its digits.
inline void sum_columns(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype, void* to) {
  constexpr int64_t kRun = 64;
  with_element_type(dtype, to, [&](auto* p) {
    for (int64_t c = 0; c < columns; c += VW) {
      vf total = zero();
      for (int64_t i = 0; i < rows; i += kRun) {
        vf part = zero();
        for (int64_t x = i; x < min(i + kRun, rows); ++x) part = part + load(from + x * from_stride + c);
        total = total + part;
      }
      store_from_float(p + c, total, columns - c);
    }
  });
}

// Rows of A and of B of a tile: their products fill the registers beside the rows of A and one of B.
constexpr int kDotRows = kRegisters == 32 ? 4 : kFma ? 3 : 2;
constexpr int kDotOthers = kRegisters == 32 ? 6 : 4;

// The VW products others j … j + VW - 1 of a row of partial sums.
MMK_INLINE vf finish_dots(const float* partial_row, int64_t j) {
  vf r[VW];
  MMK_UNROLL for (int x = 0; x < VW; ++x) r[x] = load(partial_row + (j + x) * VW);
  return sum_rows(r);
}

// C = W[rows][depth] · B for a weight of which `width` columns are `depth` units; `copy` has room for rows of
// spread_stride(depth) or, where it lies by columns, units of spread_stride(rows).
template <bool kPairs>
class WeightOperand {
 public:
  WeightOperand(Dtype dtype, const Matrix& weight, int64_t rows, int64_t width, float* copy, int64_t row_copy_stride)
      : by_columns_(weight.by_columns), rows_(rows) {
    operand_ =
        by_columns_
            ? operand_of_columns<kPairs>(dtype, transposed(weight), width, rows, false, copy, spread_stride(rows))
            : operand_of_rows<kPairs>(dtype, weight.data, weight.stride, rows, width, copy, row_copy_stride);
  }
  void multiply_into(const Result& c, const float* b, int64_t ldb, int64_t depth, int64_t columns) const {
    const int64_t row_stride = by_columns_ ? 1 : operand_.stride, k_stride = by_columns_ ? operand_.stride : 1;
    multiply(kPairs, operand_.data, row_stride, k_stride, rows_, b, ldb, depth, columns, c);
  }

 private:
  bool by_columns_;
  int64_t rows_;
  Operand operand_;
};

// The floats of a copy that WeightOperand makes of at most so many units of so many rows; none where it lies in place.
inline int64_t weight_copy_floats(Dtype dtype, const Matrix& weight, int64_t rows, int64_t depth) {
  if (weight.by_columns) return depth * spread_stride(rows);
  return dtype == Dtype::f32 ? 0 : rows * spread_stride(depth);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

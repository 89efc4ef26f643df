// The operands of concatenation fusion: one virtual matrix [x₁; …; x_M] whose columns lie in M tensors. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/workers.h"

namespace mmk {

// Rows of contiguous features at up to two strides: row r starts (r / inner)·outer_stride + (r % inner)·inner_stride
// elements after data.
struct RowView {
  void* data = nullptr;
  int64_t inner = 1, inner_stride = 0, outer_stride = 0;
};

// What a source is multiplied by: features of z += x · weightᵀ. The gradients of z have the same columns as z.
struct ConcatTerm {
  Matrix weight;         // [features, width of the source]
  void* grad = nullptr;  // [features, width] at grad_stride, by columns as W is; null: nobody asked
  int64_t grad_stride = 0;
  int64_t features = 0, column = 0;  // columns of z
};

struct ConcatSource {
  RowView x;                         // [rows, width]
  RowView grad;                      // where dx goes, dense; null data: nobody asked
  int64_t width = 0, column = 0;     // its columns of the concatenation are column … column + width - 1
  const uint8_t* present = nullptr;  // [rows], at present_stride; null: present in every row
  int64_t present_stride = 0;
  const ConcatTerm* terms = nullptr;
  int64_t term_count = 0;
  bool shares_weights = false;  // its terms have the weights and their gradients of the source before, of its width
};

struct ConcatSources {
  ConcatSource* items = nullptr;
  int64_t count = 0, rows = 0, columns = 0;
  int64_t features = 0;  // columns of z
  Dtype dtype = Dtype::f32;
};

}  // namespace mmk

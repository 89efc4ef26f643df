// Rows of a dtype in the layout that a product reads them in, as floats or, where the instruction set multiplies them
// (kPairs), as pairs of bfloat16 in 32-bit units.
#pragma once

#include "csrc/cpu/element.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/tiles.h"

namespace mmk {
namespace MMK_ISA {

// Rows of units.
struct Operand {
  const float* data = nullptr;
  int64_t stride = 0;  // between rows
};

// [count][features] of a dtype → [units][stride] floats (or pairs) with one row to a lane; lanes up to a multiple of VW
// are zero.
void pack_lanes(bool pairs, Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                float* out, int64_t stride);
void pack_lanes(bool pairs, Dtype dtype, const Matrix& m, int64_t count, int64_t features, float* out, int64_t stride);

// [count][features] of a dtype → [count][stride] floats, features padded with zeros up to a multiple of VW.
void pack_rows_as_float(Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                        float* out, int64_t stride);

// [count][features] bfloat16 → [(count + 1) / 2][stride] pairs of rows, an odd last row paired with zeros.
void pack_columns_as_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features, float* out,
                           int64_t stride);

// The same with rows and columns exchanged: [features][stride] pairs of rows of the source, features and pairs up to a
// multiple of VW.
void pack_columns_as_turned_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features,
                                  float* out, int64_t stride);

// Floats [rows][columns] → a dtype; nothing beyond the last column is written.
void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype, void* to,
                int64_t stride);

// Floats [rows][columns] → [columns][stride] of a dtype, the transposed; nothing beyond the last row is written.
void write_transposed(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype, void* to,
                      int64_t stride);

namespace {

// A row of at least n floats in an odd number of 64-byte lines: down a column, rows then use every set of a cache.
constexpr int64_t spread_stride(int64_t n) {
  const int64_t lines = (n + 15) / 16;
  return 16 * (lines + (lines + 1) % 2);
}

template <bool kPairs>
MMK_INLINE int64_t units(int64_t features) {
  return kPairs ? (features + 1) / 2 : features;
}

// Calls f(kPairs), a constant: whether products of a dtype run on bfloat16 pairs, or on float after conversion.
template <class Function>
MMK_INLINE void with_pairs(Dtype dtype, Function f) {
  if constexpr (kBf16Dot) {
    if (dtype == Dtype::bf16) return f(std::true_type{});
  }
  f(std::false_type{});
}
// The same of a call whose workers may have tiles. Pairs are then for these; what is too small for them is multiplied
// as floats, since cores with tiles multiply pairs in lanes at half that rate (csrc/cpu/runnable.h).
template <class Function>
MMK_INLINE void with_pairs(Dtype dtype, TileUnit tiles, bool is_worth_tiles, Function f) {
  if (tiles != TileUnit::none && !is_worth_tiles) return f(std::false_type{});
  with_pairs(dtype, f);
}

// [count][features] bfloat16 → [count][stride] pairs of features, an odd last one paired with zero.
inline void pack_rows_as_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features, float* out,
                               int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (features % 2 != 0) out[i * stride + features / 2] = 0.f;
    std::memcpy(out + i * stride, source + i * row_stride, static_cast<size_t>(features) * 2);
  }
}

// A matrix from an element on.
MMK_INLINE Matrix from_element(const Matrix& m, Dtype dtype, int64_t row, int64_t column) {
  const int64_t at = m.by_columns ? column * m.stride + row : row * m.stride + column;
  return {static_cast<const char*>(m.data) + at * element_size(dtype), m.stride, m.by_columns};
}

// The same elements with rows for columns.
MMK_INLINE Matrix transposed(const Matrix& m) { return {m.data, m.stride, !m.by_columns}; }

// Whether rows of a dtype are rows of units as they lie, from an element offset on.
template <bool kPairs>
MMK_INLINE bool lies_in_units(Dtype dtype, const void* data, int64_t row_stride, int64_t width) {
  if (!kPairs) return dtype == Dtype::f32;
  return row_stride % 2 == 0 && width % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0;
}

// `width` elements of `count` rows at a constant stride, as an operand of units along a row: in place, or copied.
template <bool kPairs>
Operand operand_of_rows(Dtype dtype, const void* data, int64_t row_stride, int64_t count, int64_t width, float* copy,
                        int64_t copy_stride) {
  if (lies_in_units<kPairs>(dtype, data, row_stride, width)) {
    return {static_cast<const float*>(data), kPairs ? row_stride / 2 : row_stride};
  }
  if constexpr (kPairs) {
    pack_rows_as_pairs(static_cast<const uint16_t*>(data), row_stride, count, width, copy, copy_stride);
  } else {
    pack_rows_as_float(dtype, data, row_stride, count, width, copy, copy_stride);
  }
  return {copy, copy_stride};
}

// `width` elements of `count` rows, as an operand of units along a column: [units of count][width]. In place where
// they lie so and `in_place` allows it, else copied, zeros up to a multiple of VW columns.
template <bool kPairs>
Operand operand_of_columns(Dtype dtype, const void* data, int64_t row_stride, int64_t count, int64_t width,
                           bool in_place, float* copy, int64_t copy_stride) {
  if constexpr (kPairs) {
    pack_columns_as_pairs(static_cast<const uint16_t*>(data), row_stride, count, width, copy, copy_stride);
  } else {
    if (in_place && dtype == Dtype::f32) return {static_cast<const float*>(data), row_stride};
    pack_rows_as_float(dtype, data, row_stride, count, width, copy, copy_stride);
  }
  return {copy, copy_stride};
}

// As `operand_of_columns` above, of a matrix [count][width]; in place only where its rows are dense.
template <bool kPairs>
Operand operand_of_columns(Dtype dtype, const Matrix& m, int64_t count, int64_t width, bool in_place, float* copy,
                           int64_t copy_stride) {
  if (!m.by_columns) {
    return operand_of_columns<kPairs>(dtype, m.data, m.stride, count, width, in_place, copy, copy_stride);
  }
  pack_lanes(kPairs, dtype, m.data, m.stride, width, count, copy, copy_stride);
  return {copy, copy_stride};
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

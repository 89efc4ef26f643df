// Rows of a dtype in the layout that a product reads them in, as floats or, where the instruction set multiplies them
// (kPairs), as pairs of bfloat16 in 32-bit units.
#pragma once

#include "csrc/cpu/element.h"
#include "csrc/cpu/matrix.h"

namespace mmk {
namespace MMK_ISA {
namespace {

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

// [count][features] of a dtype → [units][stride] floats (or pairs) with one row to a lane; lanes up to a multiple of VW
// are zero.
template <bool kPairs>
inline void pack_lanes(Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features, float* out,
                       int64_t stride) {
  const int64_t columns = units<kPairs>(features), whole_columns = kPairs ? features / 2 : features;
  const auto pack = [&](auto load_chunk, auto load_tile) {
    for (int64_t i = 0; i < count; i += VW) {
      for (int64_t c = 0; c < columns; c += VW) {
        float* to = out + c * stride + i;
        vf r[VW];
        if (i + VW <= count && c + VW <= whole_columns) {
          load_tile(i, c, r);
          MMK_UNROLL for (int x = 0; x < VW; ++x) store(to + x * stride, r[x]);
          continue;
        }
        for (int x = 0; x < VW; ++x) r[x] = i + x < count ? load_chunk(i + x, c) : zero();
        transpose(r);
        for (int x = 0; x < VW && c + x < columns; ++x) store(to + x * stride, r[x]);
      }
    }
  };
  if constexpr (kPairs) {
    const auto* p = static_cast<const uint16_t*>(source);
    pack([&](int64_t row, int64_t unit) { return load_pairs(p + row * row_stride + 2 * unit, features - 2 * unit); },
         [&](int64_t row, int64_t unit, vf(&r)[VW]) {
           load_transposed(static_cast<const void*>(p + row * row_stride + 2 * unit), row_stride * 2, r);
         });
  } else {
    with_element_type(dtype, source, [&](const auto* p) {
      pack([&](int64_t row, int64_t c) { return load_as_float(p + row * row_stride + c, features - c); },
           [&](int64_t row, int64_t c, vf(&r)[VW]) { load_transposed(p + row * row_stride + c, row_stride, r); });
    });
  }
}

// [count][features] of a dtype → [count][stride] floats, features padded with zeros up to a multiple of VW.
inline void pack_rows_as_float(Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                               float* out, int64_t stride) {
  with_element_type(dtype, source, [&](const auto* p) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < features; c += VW) {
        store(out + i * stride + c, load_as_float(p + i * row_stride + c, features - c));
      }
    }
  });
}

// [count][features] bfloat16 → [count][stride] pairs of features, an odd last one paired with zero.
inline void pack_rows_as_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features, float* out,
                               int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (features % 2 != 0) out[i * stride + features / 2] = 0.f;
    std::memcpy(out + i * stride, source + i * row_stride, static_cast<size_t>(features) * 2);
  }
}

// [count][features] bfloat16 → [(count + 1) / 2][stride] pairs of rows, an odd last row paired with zeros.
inline void pack_columns_as_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features,
                                  float* out, int64_t stride) {
  if constexpr (kBf16Dot) {
    constexpr int64_t kAhead = 8;  // rows
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t* even = source + i * row_stride;
      const uint16_t* later = source + max(0, min(i + kAhead, count - 2)) * row_stride;
      for (int64_t c = 0; c < features; c += 2 * VW) {
        const int64_t n = features - c;
        __builtin_prefetch(later + c, 0, 2);
        __builtin_prefetch(later + row_stride + c, 0, 2);
        float* to = out + i / 2 * stride + c;
        vf first, second;
        pair_rows(load_pairs(even + c, n), i + 1 < count ? load_pairs(even + row_stride + c, n) : zero(), first,
                  second);
        store(to, first);
        if (n > VW) store(to + VW, second);
      }
    }
  }
}

// A matrix from an element on.
MMK_INLINE Matrix from_element(const Matrix& m, Dtype dtype, int64_t row, int64_t column) {
  const int64_t at = m.by_columns ? column * m.stride + row : row * m.stride + column;
  return {static_cast<const char*>(m.data) + at * element_size(dtype), m.stride, m.by_columns};
}

// The same elements with rows for columns.
MMK_INLINE Matrix transposed(const Matrix& m) { return {m.data, m.stride, !m.by_columns}; }

// As `pack_lanes` above, of a matrix [count][features].
template <bool kPairs>
inline void pack_lanes(Dtype dtype, const Matrix& m, int64_t count, int64_t features, float* out, int64_t stride) {
  if (!m.by_columns) return pack_lanes<kPairs>(dtype, m.data, m.stride, count, features, out, stride);
  if constexpr (kPairs) {
    pack_columns_as_pairs(static_cast<const uint16_t*>(m.data), m.stride, features, count, out, stride);
  } else {
    pack_rows_as_float(dtype, m.data, m.stride, features, count, out, stride);
  }
}

// Floats [rows][columns] → [columns][stride] of a dtype, the transposed; nothing beyond the last row is written.
inline void write_transposed(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype,
                             void* to, int64_t stride) {
  with_element_type(dtype, to, [&](auto* p) {
    for (int64_t c = 0; c < columns; c += VW) {
      for (int64_t i = 0; i < rows; i += VW) {
        vf r[VW];
        for (int x = 0; x < VW; ++x) {
          r[x] = i + x < rows ? load_as_float(from + (i + x) * from_stride + c, columns - c) : zero();
        }
        transpose(r);
        for (int x = 0; x < VW && c + x < columns; ++x) store_from_float(p + (c + x) * stride + i, r[x], rows - i);
      }
    }
  });
}

// Rows of units.
struct Operand {
  const float* data = nullptr;
  int64_t stride = 0;  // between rows
};

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
  pack_lanes<kPairs>(dtype, m.data, m.stride, width, count, copy, copy_stride);
  return {copy, copy_stride};
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

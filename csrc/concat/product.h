// Products over the columns of a concatenation, one block of rows at a time:
//
//   C[rows][columns] (+)= A[rows][depth] · B[depth][columns]
//
// A is the broadcast operand of tile.h, read in place where it lies as rows of units, else from a packed copy of the
// block. B is packed in panels of kPanel columns, [panel][depth][kPanel], zero beyond the last column. Depth is counted
// in units (floats, or pairs of bfloat16) and cut into chunks of kDepth, so that a panel stays in the level-1 cache
// while all rows of the block pass over it.
#pragma once

#include "csrc/concat/sources.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/prefetch.h"
#include "csrc/cpu/tile.h"

namespace mmk {
namespace MMK_ISA {

// Where a block of results goes. Row i of the product is row map[i] of C, or i without a map.
struct Block {
  float* data;
  int64_t stride, columns;
  bool add;
  const int32_t* map = nullptr;
};

// C (+)= A · panels. Columns beyond the last of C are not touched. While a panel is worked on, the one behind it comes
// into the level-2 cache, where it is not there yet, and `ahead`, whatever is needed next.
void multiply_panels(bool pairs, Operand a, int64_t rows, const float* panels, int64_t depth, const Block& c,
                     const RowsAhead& ahead = {}, bool panels_in_cache = false);

// C (+)= A · B of a B that is read where it lies, in rows of whole vectors.
void multiply_in_place(bool pairs, Operand a, int64_t rows, Operand b, int64_t depth, const Block& c);

// c[r][f] (+)= x[r] · w[f] of rows of units, nothing packed.
void multiply_dots(bool pairs, Operand x, int64_t rows, Operand w, int64_t features, int64_t depth, float* c,
                   int64_t stride, bool add);

namespace {

constexpr int64_t kPanel = kFeatureVectors * VW;
constexpr int64_t kDepth = 256;                                     // units of a chunk: 16 KB of a panel of 16 floats
constexpr int64_t kCopyStride = kDepth + 16;                        // between rows of a copy of a chunk, at most
constexpr int64_t kMostDepth = kDepth + kDepth / 8;                 // where that saves a pass over the results
constexpr int64_t kBlockRows = kFeatureRows * (96 / kFeatureRows);  // rows of a block of A: 96 KB a chunk
constexpr int64_t kMostLanes = 5 * kPanel;                          // rows that are multiplied by features, at most
constexpr int64_t kInPlaceRows = 2 * kFeatureRows;                  // up to so many, packing W costs more than it saves
constexpr int64_t kGroup = kPanel >= 64 ? kPanel : 64;  // columns of a source that a task of the second stage packs

MMK_INLINE const char* row_address(const RowView& view, Dtype dtype, int64_t row) {
  const int64_t element = row / view.inner * view.outer_stride + row % view.inner * view.inner_stride;
  return static_cast<const char*>(view.data) + element * element_size(dtype);
}

inline bool has_row_presence(const ConcatSources& sources) {
  for (int64_t s = 0; s < sources.count; ++s) {
    if (sources.items[s].present != nullptr) return true;
  }
  return false;
}

// Whether the first chunk of the first source writes every element of z.
inline bool first_source_fills(const ConcatSources& sources) {
  if (sources.count == 0 || has_row_presence(sources) || sources.items[0].term_count != 1) return false;
  return sources.items[0].terms[0].features == sources.features;
}

// Whether a call is large enough for tiles.
inline bool is_worth_tiles(const ConcatSources& sources) {
  return sources.rows >= kTileRows && sources.features >= kTileRows && sources.columns >= 2 * kTileUnits;
}

// f(i, address of row first + i) for `count` rows.
template <class Function>
MMK_INLINE void for_row_addresses(const RowView& view, Dtype dtype, int64_t first, int64_t count, Function f) {
  const int64_t step = view.inner_stride * element_size(dtype);
  for (int64_t i = 0; i < count;) {  // a division for each run of rows, none for a row
    const char* address = row_address(view, dtype, first + i);
    for (int64_t end = min(count, i + view.inner - (first + i) % view.inner); i < end; ++i, address += step) {
      f(i, address);
    }
  }
}

MMK_INLINE int64_t tiles_of(int64_t rows, int64_t columns) {
  return ceil_div(rows, kFeatureRows) * ceil_div(columns, kPanel);
}

// [depth][columns] → panels of columns, `stride` apart, [panel][units of depth][kPanel]; for pairs, two rows to a unit.
template <bool kPairs>
void pack_panels(Dtype dtype, const Matrix& m, int64_t depth, int64_t columns, float* panels, int64_t stride) {
  if (!kPairs && dtype == Dtype::f32 && !m.by_columns && columns % kPanel == 0) {
    constexpr int64_t kAhead = 8;  // rows
    const auto* row = static_cast<const float*>(m.data);
    for (int64_t k = 0; k < depth; ++k, row += m.stride) {
      for (int64_t first = 0; first < columns; first += kPanel) {
        float* const to = panels + first / kPanel * stride + k * kPanel;
        MMK_UNROLL for (int64_t c = 0; c < kPanel; c += 16) {
          __builtin_prefetch(row + min(kAhead, depth - 1 - k) * m.stride + first + c, 0, 2);
        }
        MMK_UNROLL for (int j = 0; j < kFeatureVectors; ++j) store(to + j * VW, load(row + first + j * VW));
      }
    }
    return;
  }
  for (int64_t first = 0; first < columns; first += kPanel, panels += stride) {
    const Matrix lanes = transposed(from_element(m, dtype, 0, first));
    pack_lanes(kPairs, dtype, lanes, min(kPanel, columns - first), depth, panels, kPanel);
  }
}

// Between rows of a copy of `width` elements.
template <bool kPairs>
MMK_INLINE int64_t copy_stride(int64_t width) {
  return spread_stride(units<kPairs>(width));
}

// The rows of a block in which a source is present, and a way to read any of their columns as an operand.
class SourceRows {
 public:
  SourceRows(const ConcatSource& source, Dtype dtype, int64_t first, int64_t count)
      : source_(source), dtype_(dtype), first_(first), count_(count) {
    if (source.present == nullptr) return;
    int64_t present = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (source.present[(first + i) * source.present_stride]) map_[present++] = static_cast<int32_t>(i);
    }
    some_ = present < count;
    count_ = present;
  }

  int64_t count() const { return count_; }
  const int32_t* map() const { return some_ ? map_ : nullptr; }

  // Columns `column` … `column + width - 1` of the source.
  template <bool kPairs>
  Operand operand(int64_t column, int64_t width, float* copy) const {
    const RowView& x = source_.x;
    const int64_t bytes = element_size(dtype_);
    const int64_t inner = first_ % x.inner;
    if (!some_ && inner + count_ <= x.inner) {
      const char* data = row_address(x, dtype_, first_) + column * bytes;
      return operand_of_rows<kPairs>(dtype_, data, x.inner_stride, count_, width, copy, copy_stride<kPairs>(width));
    }
    const int64_t stride = copy_stride<kPairs>(width);
    for (int64_t i = 0; i < count_; ++i) {
      const char* data = row_address(x, dtype_, first_ + (some_ ? map_[i] : i)) + column * bytes;
      if constexpr (kPairs) {
        pack_rows_as_pairs(reinterpret_cast<const uint16_t*>(data), 0, 1, width, copy + i * stride, stride);
      } else {
        pack_rows_as_float(dtype_, data, 0, 1, width, copy + i * stride, stride);
      }
    }
    return {copy, stride};
  }

 private:
  const ConcatSource& source_;
  Dtype dtype_;
  int64_t first_, count_;
  bool some_ = false;
  int32_t map_[kBlockRows];
};

// Columns of the rows from `first` on, to come into cache within `steps` steps.
inline RowsAhead prefetch_rows(const ConcatSources& sources, int64_t s, int64_t first, int64_t count, int64_t column,
                               int64_t width, int64_t steps) {
  const RowView& x = sources.items[s].x;
  const int64_t rows = min(count, min(sources.rows - first, x.inner - first % x.inner));
  const int64_t bytes = element_size(sources.dtype);
  return {row_address(x, sources.dtype, first) + column * bytes, width * bytes, x.inner_stride * bytes, rows, steps};
}

// Elements of a chunk.
template <bool kPairs>
constexpr int64_t chunk_elements() {
  return kPairs ? 2 * kDepth : kDepth;
}
// And of one that is longer where that saves a pass over the results.
template <bool kPairs>
constexpr int64_t most_elements() {
  return kPairs ? 2 * kMostDepth : kMostDepth;
}
// Calls f(first element, elements, first unit) for the chunks of a source's columns.
template <bool kPairs, class Function>
MMK_INLINE void for_chunks(int64_t width, Function f) {
  constexpr int64_t kElements = chunk_elements<kPairs>();
  for (int64_t k = 0; k < width; k += kElements) f(k, min(kElements, width - k), kPairs ? k / 2 : k);
}

// Packs columns of plain rows; rows in which the source is absent are zero.
template <bool kPairs>
void pack_source_columns(const ConcatSource& source, Dtype dtype, int64_t first, int64_t count, int64_t column,
                         int64_t width, float* panels) {
  const int64_t depth = units<kPairs>(count), bytes = element_size(dtype);
  const auto copy = [&](int64_t row, int64_t rows, int64_t at) {
    const char* from = row_address(source.x, dtype, row) + column * bytes;
    for (int64_t c = 0; c < width; c += kPanel) {
      float* to = panels + c * depth + (kPairs ? at / 2 : at) * kPanel;
      const int64_t lanes = min(kPanel, width - c);
      if constexpr (kPairs) {
        pack_columns_as_pairs(reinterpret_cast<const uint16_t*>(from + c * bytes), source.x.inner_stride, rows, lanes,
                              to, kPanel);
      } else {
        pack_rows_as_float(dtype, from + c * bytes, source.x.inner_stride, rows, lanes, to, kPanel);
      }
    }
  };
  const bool plain = source.present == nullptr && first % source.x.inner + count <= source.x.inner;
  if (plain) return copy(first, count, 0);
  if constexpr (kPairs) {  // two rows to a unit: gathered first
    constexpr int64_t kRows = 32;
    alignas(64) uint16_t rows[kRows][kGroup];
    for (int64_t i = 0; i < count; i += kRows) {
      const int64_t n = min(kRows, count - i);
      for (int64_t r = 0; r < n; ++r) {
        const bool present = source.present == nullptr || source.present[(first + i + r) * source.present_stride];
        if (present) {
          std::memcpy(rows[r], row_address(source.x, dtype, first + i + r) + column * bytes,
                      static_cast<size_t>(width * bytes));
        } else {
          std::memset(rows[r], 0, sizeof rows[r]);
        }
      }
      for (int64_t c = 0; c < width; c += kPanel) {
        pack_columns_as_pairs(rows[0] + c, kGroup, n, min(kPanel, width - c), panels + c * depth + i / 2 * kPanel,
                              kPanel);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      if (source.present == nullptr || source.present[(first + i) * source.present_stride]) {
        copy(first + i, 1, i);
      } else {
        for (int64_t c = 0; c < width; c += kPanel)
          std::memset(panels + c * depth + i * kPanel, 0, kPanel * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

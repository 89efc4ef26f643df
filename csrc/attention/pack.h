// Operands in the layout that a product reads them in. A panel is used in place when memory already has that layout.
//
//   lanes    Qᵀ: [units][lanes], queries in the lanes of a vector
//   rows     K as it is: [keys][units], read one element at a time
//   columns  V as it is: [keys][features padded to VW], read in vectors; for bfloat16 pairs [keys / 2][features], two
//            keys to a lane; for pairs on tiles their transposed, [features][keys / 2], since a product P·V has its
//            rows, the queries, in the lanes of P, and is made as (Vᵀ·Pᵀ)ᵀ
// For float, rows and columns are the same panel.
#pragma once

#include "csrc/attention/geometry.h"
#include "csrc/cpu/pack.h"
#include "csrc/cpu/schedule.h"

namespace mmk {
namespace MMK_ISA {

struct Panel {
  const float* data;
  int64_t stride;       // between rows (for columns of pairs: between pairs of rows)
  bool turned = false;  // columns with a feature to a row
};

namespace {

// The keys or the values of all segments and heads of one wave.
class Panels {
 public:
  // `as_rows` and `as_columns`: which layouts the caller reads; whether columns for tiles are turned.
  template <bool kPairs>
  void plan(const AttentionParams& p, bool values, bool as_rows, bool as_columns, bool turns = true) {
    p_ = &p;
    values_ = values;
    pairs_ = kPairs;
    features_ = values ? p.value_dim : p.head_dim;
    padded_ = round_up(features_, VW);
    row_stride_ = kPairs ? units<kPairs>(features_) : padded_;
    turned_ = kPairs && turns && p.workers.tiles != TileUnit::none;
    for (int s = 0; s < p.key_segments; ++s) {
      const Rows& rows = source(s);
      const bool even = rows.batch % 2 == 0 && rows.head % 2 == 0 && rows.row % 2 == 0 && features_ % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(rows.data) % 4 == 0;
      const bool dense = p.dtype == Dtype::f32 && rows.row == features_ && features_ % VW == 0;
      in_place_[s] = kPairs ? even : dense;
      rows_at_[s] = columns_at_[s] = size_;
      const int64_t length = p.keys[s].length;
      if (kPairs) {
        if (as_rows && !in_place_[s]) size_ += round_up(length * row_stride_, 16);
        columns_at_[s] = size_;
        turned_stride_[s] = round_up(units<true>(length), 16) | 16;  // down a column, all sets of a cache are used
        if (as_columns) size_ += turned_ ? padded_ * turned_stride_[s] : round_up((length + 1) / 2 * padded_, 16);
      } else if (!in_place_[s]) {
        size_ += round_up(length * padded_, 16);
      }
    }
    as_rows_ = as_rows;
    as_columns_ = as_columns;
  }

  int64_t floats_per_head() const { return size_; }
  void use(float* memory) { memory_ = memory; }

  // Packs keys first … first + count - 1 of a segment for the head in `slot`.
  void pack(int64_t slot, int64_t b, int64_t h, int s, int64_t first, int64_t count) const {
    const Rows& rows = source(s);
    const void* from = row_address(rows, p_->dtype, b, h, first);
    float* base = memory_ + slot * size_;
    if (!pairs_) {
      if (in_place_[s]) return;
      pack_rows_as_float(p_->dtype, from, rows.row, count, features_, base + rows_at_[s] + first * padded_, padded_);
      return;
    }
    const auto* halves = static_cast<const uint16_t*>(from);
    if (as_rows_ && !in_place_[s]) {
      pack_rows_as_pairs(halves, rows.row, count, features_, base + rows_at_[s] + first * row_stride_, row_stride_);
    }
    if (as_columns_ && turned_) {
      pack_columns_as_turned_pairs(halves, rows.row, count, features_, base + columns_at_[s] + first / 2,
                                   turned_stride_[s]);
    } else if (as_columns_) {
      pack_columns_as_pairs(halves, rows.row, count, features_, base + columns_at_[s] + first / 2 * padded_, padded_);
    }
  }

  // From key `first` of a segment on; first is even for columns of pairs.
  Panel rows(int64_t slot, int64_t b, int64_t h, int s, int64_t first) const {
    const Rows& r = source(s);
    if (in_place_[s]) {
      const auto* address = static_cast<const float*>(row_address(r, p_->dtype, b, h, first));
      return {address, pairs_ ? r.row / 2 : r.row};
    }
    return {memory_ + slot * size_ + rows_at_[s] + first * row_stride_, row_stride_};
  }
  Panel columns(int64_t slot, int64_t b, int64_t h, int s, int64_t first) const {
    if (!pairs_) return rows(slot, b, h, s, first);
    if (turned_) return {memory_ + slot * size_ + columns_at_[s] + first / 2, turned_stride_[s], true};
    return {memory_ + slot * size_ + columns_at_[s] + first / 2 * padded_, padded_};
  }
  // The rows of a block, or its columns.
  RowPrefetch prefetch(bool as_columns, const KeyHead& x, const KeyBlock& k, int64_t steps) const {
    if (pairs_ && as_columns) {
      const Panel panel = columns(x.slot, x.b, x.h, k.index, k.first);
      if (turned_) return {panel.data, units<true>(k.count) * 4, panel.stride * 4, features_, steps};
      return {panel.data, features_ * 4, panel.stride * 4, units<true>(k.count), steps};
    }
    const Panel panel = rows(x.slot, x.b, x.h, k.index, k.first);
    return {panel.data, (pairs_ ? units<true>(features_) : features_) * 4, panel.stride * 4, k.count, steps};
  }

 private:
  const Rows& source(int s) const { return values_ ? p_->keys[s].value : p_->keys[s].key; }

  const AttentionParams* p_ = nullptr;
  bool values_ = false, pairs_ = false, as_rows_ = false, as_columns_ = false, turned_ = false;
  bool in_place_[kMaxSegments] = {};
  int64_t features_ = 0, padded_ = 0, row_stride_ = 0, size_ = 0;
  int64_t rows_at_[kMaxSegments] = {}, columns_at_[kMaxSegments] = {}, turned_stride_[kMaxSegments] = {};
  float* memory_ = nullptr;
};

// Whether a call is large enough for tiles: a query of a few, or a key, would leave most of each idle.
inline bool is_worth_tiles(const AttentionParams& p) {
  int64_t queries = 0, keys = 0;
  for (int s = 0; s < p.query_segments; ++s) queries += p.queries[s].length;
  for (int s = 0; s < p.key_segments; ++s) keys += p.keys[s].length;
  return queries >= 8 && keys >= 2 * kTileRows && p.head_dim >= kTileUnits && p.value_dim >= kTileUnits;
}

// Rows of a block of queries as the columns of a product: in place, or packed.
template <bool kPairs>
Panel pack_columns(Dtype dtype, const Rows& rows, int64_t b, int64_t h, const QueryBlock& q, int64_t features,
                   float* memory) {
  const void* from = row_address(rows, dtype, b, h, q.first);
  if (!kPairs && dtype == Dtype::f32 && features % VW == 0 && rows.row == features) {
    return {static_cast<const float*>(from), rows.row};
  }
  const int64_t stride = round_up(features, VW);
  if constexpr (kPairs) {
    pack_columns_as_pairs(static_cast<const uint16_t*>(from), rows.row, q.count, features, memory, stride);
  } else {
    pack_rows_as_float(dtype, from, rows.row, q.count, features, memory, stride);
  }
  return {memory, stride};
}

// How many key heads to pack before computing on them: as many as stay in a core's cache, and at least one per worker.
MMK_INLINE int64_t heads_per_wave(const AttentionParams& p, int64_t floats_per_head) {
  const int64_t heads = p.batch * p.kv_heads;
  if (floats_per_head == 0) return heads;
  constexpr int64_t kCacheFloats = 128 << 10;  // half of a 1 MB level-2 cache
  return max(1, min(heads, p.workers.count * max(1, kCacheFloats / floats_per_head)));
}

// Packs `heads` key heads from `begin` on into each of the panels, on all workers.
template <class KeyBlocks, class... AllPanels>
void pack_wave(const AttentionParams& p, int64_t begin, int64_t heads, const AllPanels&... panels) {
  const int64_t most = KeyBlocks(p).key_blocks;
  for_each_claim(p.workers, heads * most, 1, [&](int, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t slot = task / most, b = (begin + slot) / p.kv_heads, h = (begin + slot) % p.kv_heads;
      const KeyBlocks blocks(p, b);
      if (task % most >= blocks.key_blocks) continue;
      const KeyBlock block = blocks.key_block(task % most);
      (panels.pack(slot, b, h, block.index, block.first, block.count), ...);
    }
  });
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// Products of bfloat16 pairs on tiles:  C[rows][16·vectors] = A[rows][depth] · B[depth][16·vectors]
//
//   A tile   16 rows of 16 units, in place: rows of units (csrc/cpu/pack.h) at any stride
//   B tile   16 units of 16 lanes, in place: what the lanes read as vectors
//   C tile   16 rows of 16 floats
//
// A product makes blocks of 2 × 2 tiles, each from zero along the whole depth, in float32. The last units of a depth
// that does not fill a tile are copied and completed with zeros, on both sides, since what lies behind them may be NaN.
// The last rows, where they do not fill a tile, are multiplied together with some before them: rows do not mix. Fewer
// rows than a tile has are tiles of as many, configured so.
//
// The tiles of a worker are configured by the first product that is worth them, and released when its tasks are done
// (TileScope, in for_each_claim): nothing of torch runs in between, whose own products have another configuration.
#pragma once

#include "csrc/cpu/simd.h"
#include "csrc/cpu/tile_unit.h"

namespace mmk {
namespace MMK_ISA {

constexpr int64_t kTileRows = 16, kTileUnits = 16;

void configure_tiles(int64_t rows);  // 1 … 16, of A and of sums
void release_tiles();

// One block: one or two tiles of rows by one or two of lanes. Row tile i begins at a[i] and ends in c[i].
struct TileBlock {
  const float* a[2];
  int64_t lda;
  const float* b;
  int64_t ldb, steps;            // whole tiles along the depth
  const float *a_tail, *b_tail;  // one more, or null: [2][16][16] and [16][32]
  float* c[2];
  int64_t ldc;
  bool adds;  // to what C holds
};
void multiply_tile_block(const TileBlock& x, bool two_rows, bool two_columns);

// `units` < 16 units of at most 16 rows, completed with zeros: [count][16].
void complete_units(const float* rows, int64_t stride, int64_t count, int64_t units, float* to);
// `count` < 16 rows of 16·vectors lanes, completed with rows of zeros: [16][32].
void complete_rows(const float* rows, int64_t stride, int64_t count, int64_t vectors, float* to);

struct TileOperands {
  const float* a;
  int64_t lda, rows;
  const float* b;
  int64_t ldb, depth, vectors;
  bool adds = false;  // to what C holds
};

// The product, into memory.
void multiply_tiles(const TileOperands& x, float* c, int64_t ldc);

namespace {

// Whether this thread multiplies on tiles. What decides whether a product does must not depend on how the call was cut
// into tasks, or bits would depend on the number of threads: it is its depth, or the size of the call (is_worth_tiles).
MMK_INLINE bool has_tiles() {
  if constexpr (!kBf16Dot) return false;
  return __builtin_expect(__atomic_load_n(&tiles_were_chosen, __ATOMIC_RELAXED), false) &&
         tile_thread.unit != TileUnit::none;
}

// The tiles of a thread for as long as it works on tasks.
class TileScope {
 public:
  explicit TileScope(TileUnit unit) {
    if constexpr (kBf16Dot) {
      if (unit == TileUnit::none || tile_thread.unit != TileUnit::none) return;
      tile_thread = {unit, 0};
      opened_ = true;
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (!opened_) return;
    if (tile_thread.rows != 0) release_tiles();
    tile_thread = {TileUnit::none, 0};
  }

 private:
  bool opened_ = false;
};

// Walks over the blocks of a product. write(i, row) is where row tile i of a block ends whose first row is `row`, and
// done(tile, rows, first column) what happens then, both for the rows that no other tile has.
template <class Write, class Done>
MMK_INLINE void walk_tiles(const TileOperands& x, int64_t ldc, Write write, Done done) {
  const int64_t tile_rows = min(kTileRows, x.rows);
  if (tile_thread.rows != tile_rows) configure_tiles(tile_rows);
  alignas(64) float a_tail[2 * kTileRows * kTileUnits], b_tail[kTileUnits * 2 * VW];
  const int64_t steps = x.depth / kTileUnits, rest = x.depth % kTileUnits, whole = steps * kTileUnits;
  for (int64_t v = 0; v < x.vectors; v += 2) {
    const float* const b = x.b + v * VW;
    const int64_t columns = min(2, x.vectors - v);
    if (rest > 0) complete_rows(b + whole * x.ldb, x.ldb, rest, columns, b_tail);
    for (int64_t row = 0; row < x.rows; row += 2 * kTileRows) {
      const bool two_rows = x.rows - row > kTileRows;
      TileBlock block{{}, x.lda, b, x.ldb, steps, rest > 0 ? a_tail : nullptr, b_tail, {}, ldc, x.adds};
      for (int64_t i = 0; i <= two_rows; ++i) {
        const int64_t first = min(row + i * kTileRows, x.rows - tile_rows);
        block.a[i] = x.a + first * x.lda;
        block.c[i] = write(i, first, v);
        if (rest > 0) complete_units(block.a[i] + whole, x.lda, tile_rows, rest, a_tail + i * kTileRows * kTileUnits);
      }
      multiply_tile_block(block, two_rows, columns == 2);
      for (int64_t i = 0; i <= two_rows; ++i) {
        const int64_t begin = row + i * kTileRows, first = min(begin, x.rows - tile_rows);
        done(block.c[i] + (begin - first) * ldc, begin, min(kTileRows, x.rows - begin), v, columns);
      }
    }
  }
}

// Calls sink(tile, first row, rows, first vector, vectors) for the tiles of a product, once for every row; `tile` has
// kTileStride floats to a row.
constexpr int64_t kTileStride = 32;
template <class Sink>
MMK_INLINE void for_tiles(const TileOperands& x, Sink sink) {
  alignas(64) float block[2 * kTileRows * kTileStride];
  walk_tiles(x, kTileStride, [&](int64_t i, int64_t, int64_t) { return block + i * kTileRows * kTileStride; }, sink);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

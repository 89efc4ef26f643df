// The products of concatenation fusion, compiled once for all ops of an instruction set.
#include "csrc/concat/product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs, int MR, int NR, class Ldb = Constant<kPanel>>
MMK_NOINLINE void product_tile(Operand a, const float* panel, int64_t depth, const Block& c, int64_t row,
                               int64_t column, Ldb ldb = {}) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, a.data, a.stride, Constant<1>{}, panel, ldb, depth);
  const int64_t last = c.columns - column - (NR - 1) * VW;  // columns of the last vector
  MMK_UNROLL for (int i = 0; i < MR; ++i) {
    float* to = c.data + (c.map == nullptr ? row + i : c.map[row + i]) * c.stride + column;
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      if (j < NR - 1 || last >= VW) {
        store(to + j * VW, c.add ? load(to + j * VW) + acc[i][j] : acc[i][j]);
      } else {
        store_partial(to + j * VW, c.add ? load_partial(to + j * VW, last) + acc[i][j] : acc[i][j], last);
      }
    }
  }
}

// Whether tiles of a product can be stored, and added, where it ends.
MMK_INLINE bool ends_in_place(const Block& c, int64_t column, int64_t vectors) {
  return c.map == nullptr && c.columns - column >= vectors * VW;
}

// A product on tiles, from `column` of C on.
MMK_NOINLINE void multiply_on_tiles(const TileOperands& x, const Block& c, int64_t column) {
  if (ends_in_place(c, column, x.vectors)) return multiply_tiles(x, c.data + column, c.stride);
  for_tiles(x, [&](const float* tile, int64_t row, int64_t rows, int64_t v, int64_t vectors) {
    for (int64_t i = row; i < row + rows; ++i, tile += kTileStride) {
      float* const to = c.data + (c.map == nullptr ? i : c.map[i]) * c.stride;
      for (int64_t j = 0; j < vectors; ++j) {
        const int64_t at = column + (v + j) * VW, n = c.columns - at;
        const vf sum = load(tile + j * VW);
        if (n >= VW) {
          store(to + at, c.add ? load(to + at) + sum : sum);
        } else {
          store_partial(to + at, c.add ? load_partial(to + at, n) + sum : sum, n);
        }
      }
    }
  });
}

// All panels: of 32 rows and kTileDepth units at a time, so that these stay in the level-1 cache while panels pass.
void multiply_panels_on_tiles(Operand a, int64_t rows, const float* panels, int64_t depth, Block c) {
  constexpr int64_t kRows = 2 * kTileRows, kTileDepth = 128, kStride = kTileDepth + kTileUnits;
  alignas(64) float copy[(kRows + kTileRows) * kStride];
  // Rows a multiple of 1 KB apart share a few sets of that cache.
  const bool crowded = a.stride % 256 == 0 && c.columns > kPanel;
  const int64_t parts = max(1, ceil_div(depth, kTileDepth)), part = round_up(ceil_div(depth, parts), kTileUnits);
  float* const to = c.data;
  const int32_t* const map = c.map;
  const bool add = c.add;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, count = left < kRows + kTileRows ? left : kRows;  // a tile at least
    if (map == nullptr) {
      c.data = to + row * c.stride;
    } else {
      c.map = map + row;
    }
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t k = i * part, some = min(part, depth - k);
      if (some <= 0 && i > 0) break;
      Operand x{a.data + row * a.stride + k, a.stride};
      if (crowded && some % kTileUnits == 0) {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t u = 0; u < some; u += VW) store(copy + r * kStride + u, load(x.data + r * x.stride + u));
        }
        x = {copy, kStride};
      }
      c.add = add || k > 0;
      const float* panel = panels + k * kPanel;
      for (int64_t column = 0; column < c.columns; column += kPanel, panel += depth * kPanel) {
        const int64_t vectors = ceil_div(min(kPanel, c.columns - column), VW);
        const bool adds = c.add && ends_in_place(c, column, vectors);
        multiply_on_tiles({x.data, x.stride, count, panel, kPanel, some, vectors, adds}, c, column);
      }
    }
    row += count;
  }
}

template <bool kPairs>
void multiply_units(Operand a, int64_t rows, const float* panels, int64_t depth, const Block& c,
                    const RowsAhead& rows_ahead, bool panels_in_cache) {
  if (kPairs && rows > 0 && has_tiles()) return multiply_panels_on_tiles(a, rows, panels, depth, c);
  RowPrefetch ahead(rows_ahead);
  constexpr int64_t kLineFloats = 16;
  const int64_t panel_lines = panels_in_cache ? 0 : depth * kPanel / kLineFloats;
  for (int64_t column = 0; column < c.columns; column += kPanel, panels += depth * kPanel) {
    RowPrefetch next_panel(panels + depth * kPanel, 64, 64, panel_lines, ceil_div(rows, kFeatureRows));
    with_constant<kFeatureVectors>(ceil_div(min(kPanel, c.columns - column), VW), [&](auto vectors) {
      for_runs<kFeatureRows>(rows, [&](auto run, int64_t i) {
        next_panel.step<false>();
        ahead.step<false>();
        product_tile<kPairs, static_cast<int>(run), static_cast<int>(vectors)>({a.data + i * a.stride, a.stride},
                                                                               panels, depth, c, i, column);
      });
    });
  }
}

template <bool kPairs>
void multiply_units_in_place(Operand a, int64_t rows, Operand b, int64_t depth, const Block& c) {
  if (kPairs && rows > 0 && has_tiles()) {
    const int64_t vectors = ceil_div(c.columns, VW);
    const bool adds = c.add && ends_in_place(c, 0, vectors);
    return multiply_on_tiles({a.data, a.stride, rows, b.data, b.stride, depth, vectors, adds}, c, 0);
  }
  for (int64_t column = 0; column < c.columns; column += kPanel) {
    with_constant<kFeatureVectors>(ceil_div(min(kPanel, c.columns - column), VW), [&](auto vectors) {
      for_runs<kFeatureRows>(rows, [&](auto run, int64_t i) {
        product_tile<kPairs, static_cast<int>(run), static_cast<int>(vectors)>(
            {a.data + i * a.stride, a.stride}, b.data + column, depth, c, i, column, b.stride);
      });
    });
  }
}

// c[r][f] (+)= x[r] · w[f] over `depth` units, in vectors along the units.
template <bool kPairs, int R, int F>
MMK_NOINLINE void dot_tile(Operand x, Operand w, int64_t depth, float* c, int64_t stride, bool add) {
  vf acc[R][F];
  clear(acc);
  const auto step = [&](int64_t k, auto load_units) {
    vf xs[R];
    MMK_UNROLL for (int r = 0; r < R; ++r) xs[r] = load_units(x.data + r * x.stride + k);
    MMK_UNROLL for (int f = 0; f < F; ++f) {
      const vf wf = load_units(w.data + f * w.stride + k);
      MMK_UNROLL for (int r = 0; r < R; ++r) acc[r][f] = multiply_add<kPairs>(acc[r][f], xs[r], wf);
    }
  };
  int64_t k = 0;
  for (; k + VW <= depth; k += VW) step(k, [](const float* p) { return load(p); });
  if (k < depth) step(k, [&](const float* p) { return load_partial(p, depth - k); });
  MMK_UNROLL for (int r = 0; r < R; ++r) {
    MMK_UNROLL for (int f = 0; f < F; ++f) {
      float& to = c[r * stride + f];
      to = add ? to + sum(acc[r][f]) : sum(acc[r][f]);
    }
  }
}

template <bool kPairs>
void dot_units(Operand x, int64_t rows, Operand w, int64_t features, int64_t depth, float* c, int64_t stride,
               bool add) {
  constexpr int kTileRows = kRegisters == 32 ? 4 : 2, kTileFeatures = 4;
  for_runs<kTileFeatures>(features, [&](auto width, int64_t f) {
    for_runs<kTileRows>(rows, [&](auto height, int64_t r) {
      dot_tile<kPairs, static_cast<int>(height), static_cast<int>(width)>(
          {x.data + r * x.stride, x.stride}, {w.data + f * w.stride, w.stride}, depth, c + r * stride + f, stride, add);
    });
  });
}

}  // namespace

void multiply_panels(bool pairs, Operand a, int64_t rows, const float* panels, int64_t depth, const Block& c,
                     const RowsAhead& ahead, bool panels_in_cache) {
  if constexpr (kBf16Dot) {
    if (pairs) return multiply_units<true>(a, rows, panels, depth, c, ahead, panels_in_cache);
  }
  multiply_units<false>(a, rows, panels, depth, c, ahead, panels_in_cache);
}

void multiply_in_place(bool pairs, Operand a, int64_t rows, Operand b, int64_t depth, const Block& c) {
  if constexpr (kBf16Dot) {
    if (pairs) return multiply_units_in_place<true>(a, rows, b, depth, c);
  }
  multiply_units_in_place<false>(a, rows, b, depth, c);
}

void multiply_dots(bool pairs, Operand x, int64_t rows, Operand w, int64_t features, int64_t depth, float* c,
                   int64_t stride, bool add) {
  if constexpr (kBf16Dot) {
    if (pairs) return dot_units<true>(x, rows, w, features, depth, c, stride, add);
  }
  dot_units<false>(x, rows, w, features, depth, c, stride, add);
}

}  // namespace MMK_ISA
}  // namespace mmk

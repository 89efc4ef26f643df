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

template <bool kPairs>
void multiply_units(Operand a, int64_t rows, const float* panels, int64_t depth, const Block& c,
                    const RowsAhead& rows_ahead) {
  RowPrefetch ahead(rows_ahead);
  constexpr int64_t kLineFloats = 16;
  const int64_t panel_lines = depth * kPanel / kLineFloats;
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

}  // namespace

void multiply_panels(bool pairs, Operand a, int64_t rows, const float* panels, int64_t depth, const Block& c,
                     const RowsAhead& ahead) {
  if constexpr (kBf16Dot) {
    if (pairs) return multiply_units<true>(a, rows, panels, depth, c, ahead);
  }
  multiply_units<false>(a, rows, panels, depth, c, ahead);
}

void multiply_in_place(Operand a, int64_t rows, Operand b, int64_t depth, const Block& c) {
  for (int64_t column = 0; column < c.columns; column += kPanel) {
    with_constant<kFeatureVectors>(ceil_div(min(kPanel, c.columns - column), VW), [&](auto vectors) {
      for_runs<kFeatureRows>(rows, [&](auto run, int64_t i) {
        product_tile<false, static_cast<int>(run), static_cast<int>(vectors)>(
            {a.data + i * a.stride, a.stride}, b.data + column, depth, c, i, column, b.stride);
      });
    });
  }
}

}  // namespace MMK_ISA
}  // namespace mmk

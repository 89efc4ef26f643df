// The products of blocks of rows, compiled once for all ops of an instruction set.
#include "csrc/cpu/products.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs, int MR, int NR, class RowStride, class KStride>
MMK_NOINLINE void product_tile(const float* a, RowStride row_stride, KStride k_stride, const float* b, int64_t ldb,
                               int64_t depth, const Result& c, int64_t row, int64_t column) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, a, row_stride, k_stride, b, ldb, depth);
  with_combine(c, [&](auto combine) {
    MMK_UNROLL for (int i = 0; i < MR; ++i) {
      MMK_UNROLL for (int j = 0; j < NR; ++j) combine(acc[i][j], (row + i) * c.stride + column + j * VW);
    }
  });
}

template <bool kPairs, class RowStride, class KStride>
void multiply_units(const float* a, RowStride row_stride, KStride k_stride, int64_t rows, const float* b, int64_t ldb,
                    int64_t depth, int64_t columns, const Result& c) {
  const int64_t vectors = ceil_div(columns, VW);
  const auto run = [&](auto most_rows, auto most_vectors) {
    for_runs<static_cast<int>(most_vectors)>(vectors, [&](auto width, int64_t v) {
      for_runs<static_cast<int>(most_rows)>(rows, [&](auto height, int64_t i) {
        product_tile<kPairs, static_cast<int>(height), static_cast<int>(width)>(
            a + i * row_stride, row_stride, k_stride, b + v * VW, ldb, depth, c, i, v * VW);
      });
    });
  };
  // Few rows leave registers free: a wider tile then hides the latency of the sums.
  if (rows == 1) return run(Constant<1>{}, Constant<8>{});
  if (rows == 2) return run(Constant<2>{}, Constant<4>{});
  run(Constant<kFeatureRows>{}, Constant<kFeatureVectors>{});
}

// partial[i][j] += Σ_k a[i][k] · b[j][k], one sum per lane.
template <bool kPairs, int MR, int NR>
MMK_NOINLINE void dot_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* partial,
                           int64_t ldp) {
  vf acc[MR][NR];
  clear(acc);
  const auto step = [&](auto load_row) {
    vf x[MR];
    MMK_UNROLL for (int i = 0; i < MR; ++i) x[i] = load_row(a + i * lda);
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const vf y = load_row(b + j * ldb);
      MMK_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] = multiply_add<kPairs>(acc[i][j], x[i], y);
    }
  };
  int64_t k = 0;
  for (; k + VW <= depth; k += VW) step([&](const float* p) { return load(p + k); });
  if (k < depth) step([&](const float* p) { return load_partial(p + k, depth - k); });
  MMK_UNROLL for (int i = 0; i < MR; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      float* to = partial + (i * ldp + j) * VW;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <bool kPairs>
void dot_units(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t others, int64_t depth,
               float* partial, int64_t ldp) {
  constexpr int64_t kRowsInCache = 4 * kDotRows;  // rows of A that stay in the first cache while B passes by
  for (int64_t first = 0; first < rows; first += kRowsInCache) {
    for_runs<kDotOthers>(others, [&](auto width, int64_t j) {
      for_runs<kDotRows>(min(kRowsInCache, rows - first), [&](auto height, int64_t x) {
        const int64_t i = first + x;
        dot_tile<kPairs, static_cast<int>(height), static_cast<int>(width)>(a + i * lda, lda, b + j * ldb, ldb, depth,
                                                                            partial + (i * ldp + j) * VW, ldp);
      });
    });
  }
}

// A's rows or its columns are dense: no register holds that stride.
template <bool kPairs, class... Arguments>
void multiply_strided(const float* a, int64_t row_stride, int64_t k_stride, Arguments... rest) {
  if (k_stride == 1) return multiply_units<kPairs>(a, row_stride, Constant<1>{}, rest...);
  multiply_units<kPairs>(a, Constant<1>{}, k_stride, rest...);
}

// On tiles, A as rows.
MMK_NOINLINE void multiply_rows(const TileOperands& x, const Result& c) {
  with_combine(c, [&](auto combine) {
    for_tiles(x, [&](const float* tile, int64_t row, int64_t rows, int64_t v, int64_t vectors) {
      for (int64_t i = row; i < row + rows; ++i, tile += kTileStride) {
        for (int64_t j = 0; j < vectors; ++j) combine(load(tile + j * VW), i * c.stride + (v + j) * VW);
      }
    });
  });
}

// The same of an A whose columns are dense: [depth][rows], transposed first.
MMK_NOINLINE void multiply_columns(const float* a, int64_t k_stride, int64_t rows, const float* b, int64_t ldb,
                                   int64_t depth, int64_t vectors, const Result& c) {
  const int64_t stride = spread_stride(round_up(depth, VW));
  const Scratch copy(rows * stride);
  for (int64_t i = 0; i < rows; i += VW) {
    for (int64_t k = 0; k < depth; k += VW) {
      const int64_t some = min(VW, rows - i);
      vf r[VW];
      for (int64_t x = 0; x < VW; ++x) {
        r[x] = k + x < depth ? load_as_float(a + (k + x) * k_stride + i, some) : zero();
      }
      transpose(r);
      for (int64_t x = 0; x < some; ++x) store(copy.data() + (i + x) * stride + k, r[x]);
    }
  }
  multiply_rows({copy.data(), stride, rows, b, ldb, depth, vectors}, c);
}

}  // namespace

void multiply(bool pairs, const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, const float* b,
              int64_t ldb, int64_t depth, int64_t columns, const Result& c) {
  if constexpr (kBf16Dot) {
    if (pairs && rows > 0 && depth >= kTileUnits / 2 && has_tiles()) {
      const int64_t vectors = ceil_div(columns, VW);
      if (k_stride == 1) return multiply_rows({a, row_stride, rows, b, ldb, depth, vectors}, c);
      return multiply_columns(a, k_stride, rows, b, ldb, depth, vectors, c);
    }
    if (pairs) return multiply_strided<true>(a, row_stride, k_stride, rows, b, ldb, depth, columns, c);
  }
  multiply_strided<false>(a, row_stride, k_stride, rows, b, ldb, depth, columns, c);
}

void dot_rows(bool pairs, const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t others,
              int64_t depth, float* partial, int64_t ldp) {
  if constexpr (kBf16Dot) {
    if (pairs) return dot_units<true>(a, lda, rows, b, ldb, others, depth, partial, ldp);
  }
  dot_units<false>(a, lda, rows, b, ldb, others, depth, partial, ldp);
}

}  // namespace MMK_ISA
}  // namespace mmk

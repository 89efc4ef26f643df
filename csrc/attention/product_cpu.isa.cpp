// Attention's products, compiled once for all of its kernels of an instruction set.
#include "csrc/attention/product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <class T, int MR, int NR>
MMK_INLINE void store_tile(T* to, int64_t stride, const vf (&acc)[MR][NR]) {
  MMK_UNROLL for (int r = 0; r < MR; ++r) {
    MMK_UNROLL for (int j = 0; j + 1 < NR; j += 2) {
      write_pair<false>(to + r * stride + j * VW, acc[r][j], acc[r][j + 1]);
    }
    if constexpr (NR % 2 != 0) store_from_float(to + r * stride + (NR - 1) * VW, acc[r][NR - 1]);
  }
}

// What becomes of a tile from `row` and `column` on.
template <int MR, int NR>
MMK_INLINE void finish_tile(vf (&acc)[MR][NR], const Epilogue& e, int64_t row, int64_t column) {
  if (e.factor != 1.f) {
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      MMK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = acc[r][j] * set1(e.factor);
    }
  }
  if (e.old_factor != nullptr) {
    const float* from = e.from + row * e.from_stride + column;
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const vf factor = set1(e.old_factor[row + r]);
      MMK_UNROLL for (int j = 0; j < NR; ++j) {
        acc[r][j] = fma(factor, load(from + r * e.from_stride + j * VW), acc[r][j]);
      }
    }
  }
  if (e.finish != nullptr) {
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const vf factor = set1(e.finish[row + r]);
      MMK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = acc[r][j] * factor;
    }
  }
  const int64_t at = row * e.to_stride + column;
  if (e.to_dtype == Dtype::f32) {
    store_tile(static_cast<float*>(e.to) + at, e.to_stride, acc);
  } else if (e.to_dtype == Dtype::bf16) {
    store_tile(static_cast<Bf16*>(e.to) + at, e.to_stride, acc);
  } else {
    store_tile(static_cast<F16*>(e.to) + at, e.to_stride, acc);
  }
}

template <bool kPairs, int MR, int NR, class RowStride, class KStride>
MMK_NOINLINE void feature_tile(const float* a, RowStride row_stride, KStride k_stride, Panel columns, int64_t depth,
                               const Epilogue& e, int64_t row, int64_t column) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, a, row_stride, k_stride, columns.data + column, columns.stride, depth);
  finish_tile(acc, e, row, column);
}

template <bool kPairs, class RowStride, class KStride>
void multiply_units(const float* a, RowStride row_stride, KStride k_stride, int64_t rows, Panel columns, int64_t depth,
                    int64_t features, const Epilogue& e) {
  for_runs<kFeatureVectors>(ceil_div(features, VW), [&](auto vectors, int64_t v) {
    for_runs<kFeatureRows>(rows, [&](auto run, int64_t i) {
      feature_tile<kPairs, static_cast<int>(run), static_cast<int>(vectors)>(a + i * row_stride, row_stride, k_stride,
                                                                             columns, depth, e, i, v * VW);
    });
  });
}

// A's rows or its columns are dense: no register holds that stride.
template <bool kPairs, class... Arguments>
void multiply_strided(const float* a, int64_t row_stride, int64_t k_stride, Arguments... rest) {
  if (k_stride == 1) return multiply_units<kPairs>(a, row_stride, Constant<1>{}, rest...);
  multiply_units<kPairs>(a, Constant<1>{}, k_stride, rest...);
}

// On tiles.
MMK_NOINLINE void multiply_rows(const TileOperands& x, const Epilogue& e) {
  for_tiles(x, [&](const float* tile, int64_t row, int64_t rows, int64_t v, int64_t vectors) {
    with_constant<2>(vectors, [&](auto width) {
      constexpr int NR = static_cast<int>(width);
      for_runs<4>(rows, [&](auto height, int64_t i) {
        constexpr int MR = static_cast<int>(height);
        vf acc[MR][NR];
        MMK_UNROLL for (int r = 0; r < MR; ++r) {
          MMK_UNROLL for (int j = 0; j < NR; ++j) acc[r][j] = load(tile + (i + r) * kTileStride + j * VW);
        }
        finish_tile(acc, e, row + i, v * VW);
      });
    });
  });
}

// The same of a product that comes out transposed, features by rows of the result.
MMK_NOINLINE void multiply_turned(const TileOperands& x, int64_t rows, const Epilogue& e) {
  for_tiles(x, [&](const float* tile, int64_t feature, int64_t, int64_t v, int64_t vectors) {
    for (int64_t j = v; j < v + vectors; ++j, tile += VW) {
      vf r[VW];
      load_transposed(tile, kTileStride, r);
      if (rows - j * VW >= VW) {
        MMK_UNROLL for (int i = 0; i < VW; i += 4) {
          vf acc[4][1] = {{r[i]}, {r[i + 1]}, {r[i + 2]}, {r[i + 3]}};
          finish_tile(acc, e, j * VW + i, feature);
        }
        continue;
      }
      for (int64_t i = 0; i < rows - j * VW; ++i) {
        vf acc[1][1] = {{r[i]}};
        finish_tile(acc, e, j * VW + i, feature);
      }
    }
  });
}

}  // namespace

void multiply_features(bool pairs, const float* a, int64_t row_stride, int64_t k_stride, int64_t rows, Panel columns,
                       int64_t depth, int64_t features, const Epilogue& e) {
  if constexpr (kBf16Dot) {
    if (columns.turned) {
      const int64_t lanes = ceil_div(rows, VW);
      return multiply_turned({columns.data, columns.stride, round_up(features, VW), a, k_stride, depth, lanes}, rows,
                             e);
    }
    if (pairs && k_stride == 1 && has_tiles()) {
      return multiply_rows({a, row_stride, rows, columns.data, columns.stride, depth, ceil_div(features, VW)}, e);
    }
    if (pairs) return multiply_strided<true>(a, row_stride, k_stride, rows, columns, depth, features, e);
  }
  multiply_strided<false>(a, row_stride, k_stride, rows, columns, depth, features, e);
}

void multiply_turned_features(const float* a, int64_t stride, int64_t vectors, Panel columns, int64_t depth,
                              int64_t features, bool adds, float* to, int64_t to_stride) {
  multiply_tiles({columns.data, columns.stride, round_up(features, VW), a, stride, depth, vectors, adds}, to,
                 to_stride);
}

void store_lanes(const float* from, int64_t stride, int64_t count, int64_t features, const float* factor, void* to,
                 int64_t to_stride) {
  if constexpr (kBf16Dot) {
    for (int64_t i = 0; i < count; i += VW) {
      const vf scale = load(factor + i);
      for (int64_t c = 0; c < features; c += 2 * VW) {  // pairs of features are transposed as one
        const float* const at = from + c * stride + i;
        vf r[VW];
        const auto load_pair = [&](int x) {
          return pair(load(at + 2 * x * stride) * scale, load(at + (2 * x + 1) * stride) * scale);
        };
        MMK_UNROLL for (int x = 0; x < VW / 2; ++x) r[x] = load_pair(x);
        const bool whole = features - c > VW;
        MMK_UNROLL for (int x = VW / 2; x < VW; ++x) r[x] = whole ? load_pair(x) : zero();
        transpose(r);
        auto* row = static_cast<uint16_t*>(to) + i * to_stride + c;
        const int64_t rows = min(VW, count - i), bytes = min(2 * VW, features - c) * 2;
        if (rows == VW && bytes == 4 * VW) {
          MMK_UNROLL for (int x = 0; x < VW; ++x) std::memcpy(row + x * to_stride, &r[x], sizeof(vf));
          continue;
        }
        for (int64_t x = 0; x < rows; ++x) std::memcpy(row + x * to_stride, &r[x], static_cast<size_t>(bytes));
      }
    }
  }
}

void store_turned_features(const float* a, int64_t stride, int64_t count, Panel columns, int64_t depth,
                           int64_t features, const float* factor, void* to, int64_t to_stride) {
  alignas(64) float block[2 * kTileRows * kTileStride];
  for (int64_t i = 0; i < count; i += 2 * VW) {
    const int64_t lanes = min(2 * VW, count - i);
    for (int64_t c = 0; c < features; c += 2 * kTileRows) {
      const int64_t some = min(2 * kTileRows, features - c);
      multiply_turned_features(a + i, stride, ceil_div(lanes, VW), {columns.data + c * columns.stride, columns.stride},
                               depth, some, false, block, kTileStride);
      store_lanes(block, kTileStride, lanes, some, factor + i, static_cast<uint16_t*>(to) + i * to_stride + c,
                  to_stride);
    }
  }
}

}  // namespace MMK_ISA
}  // namespace mmk

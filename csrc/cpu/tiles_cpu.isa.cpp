// The only file with tile instructions. They are written out, not left to intrinsics: those of GCC 12 do not say that a
// tile is read from memory, so that a store to it may move behind them. Nothing else knows of the eight registers, and
// none of them lives beyond a call of this file but through the configuration.
#include "csrc/cpu/element.h"
#include "csrc/cpu/tiles.h"

namespace mmk {
namespace MMK_ISA {

#if defined(MMK_EMULATED) || !defined(__AVX512BF16__)
#undef MMK_AMX
#endif

namespace {

#ifdef MMK_AMX
struct Amx {
  static void configure(const TileConfiguration& x) { asm volatile("ldtilecfg %0" ::"m"(x) : "memory"); }
  static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int kTile>
  static MMK_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static MMK_INLINE void load(const float* p, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static MMK_INLINE void store(float* p, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  template <int kSums, int kA, int kB>
  static MMK_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
  }
};
#endif

#ifdef MMK_TEST_ISA
struct Portable {
  static void configure(const TileConfiguration& x) { portable_tiles::configure(x); }
  static void release() { portable_tiles::release(); }
  template <int kTile>
  static void zero() {
    portable_tiles::zero(kTile);
  }
  template <int kTile>
  static void load(const float* p, int64_t stride_bytes) {
    portable_tiles::load(kTile, p, stride_bytes);
  }
  template <int kTile>
  static void store(float* p, int64_t stride_bytes) {
    portable_tiles::store(kTile, p, stride_bytes);
  }
  template <int kSums, int kA, int kB>
  static void dot() {
    portable_tiles::dot(kSums, kA, kB);
  }
};
#endif

// Calls f with the unit of this thread.
template <class Function>
MMK_INLINE void with_unit([[maybe_unused]] Function f) {
#ifdef MMK_TEST_ISA
  if constexpr (kBf16Dot) {
    if (tile_thread.unit == TileUnit::portable) return f(Portable());
  }
#endif
#ifdef MMK_AMX
  f(Amx());
#endif
}

// C = A · B of R × C tiles, or C + A · B. Sums are tiles 0 … 3, rows of A 4 and 5, B 6 and 7.
template <class Unit, int R, int C>
MMK_NOINLINE void multiply_block(const TileBlock& x) {
  if (x.adds) {
    const int64_t c_bytes = x.ldc * 4;
    Unit::template load<0>(x.c[0], c_bytes);
    if constexpr (C == 2) Unit::template load<1>(x.c[0] + VW, c_bytes);
    if constexpr (R == 2) Unit::template load<2>(x.c[1], c_bytes);
    if constexpr (R == 2 && C == 2) Unit::template load<3>(x.c[1] + VW, c_bytes);
  } else {
    Unit::template zero<0>();
    if constexpr (C == 2) Unit::template zero<1>();
    if constexpr (R == 2) Unit::template zero<2>();
    if constexpr (R == 2 && C == 2) Unit::template zero<3>();
  }
  const auto step = [](const float* a0, const float* a1, int64_t a_bytes, const float* b, int64_t b_bytes) {
    Unit::template load<4>(a0, a_bytes);
    Unit::template load<6>(b, b_bytes);
    Unit::template dot<0, 4, 6>();
    if constexpr (C == 2) {
      Unit::template load<7>(b + VW, b_bytes);
      Unit::template dot<1, 4, 7>();
    }
    if constexpr (R == 2) {
      Unit::template load<5>(a1, a_bytes);
      Unit::template dot<2, 5, 6>();
      if constexpr (C == 2) Unit::template dot<3, 5, 7>();
    }
  };
  const float *a0 = x.a[0], *a1 = x.a[R - 1], *b = x.b;
  const int64_t a_bytes = x.lda * 4, b_bytes = x.ldb * 4, b_step = x.ldb * kTileUnits;
  for (int64_t n = x.steps; n > 0; --n) {
    step(a0, a1, a_bytes, b, b_bytes);
    a0 += kTileUnits;
    a1 += kTileUnits;
    b += b_step;
  }
  if (x.a_tail != nullptr) {
    step(x.a_tail, x.a_tail + kTileRows * kTileUnits, 4 * kTileUnits, x.b_tail, 4 * 2 * VW);
  }
  const int64_t c_bytes = x.ldc * 4;  // again: no register is kept for it through the steps
  Unit::template store<0>(x.c[0], c_bytes);
  if constexpr (C == 2) Unit::template store<1>(x.c[0] + VW, c_bytes);
  if constexpr (R == 2) Unit::template store<2>(x.c[1], c_bytes);
  if constexpr (R == 2 && C == 2) Unit::template store<3>(x.c[1] + VW, c_bytes);
}

}  // namespace

void configure_tiles(int64_t rows) {
  TileConfiguration x{};
  x.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    x.row_bytes[tile] = 4 * kTileUnits;
    x.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileUnits);
  }
  with_unit([&](auto unit) { unit.configure(x); });
  tile_thread.rows = static_cast<int8_t>(rows);
}

void release_tiles() {
  with_unit([](auto unit) { unit.release(); });
}

void multiply_tile_block([[maybe_unused]] const TileBlock& x, [[maybe_unused]] bool two_rows,
                         [[maybe_unused]] bool two_columns) {
  with_unit([&](auto unit) {
    using Unit = decltype(unit);
    if (two_rows) return two_columns ? multiply_block<Unit, 2, 2>(x) : multiply_block<Unit, 2, 1>(x);
    two_columns ? multiply_block<Unit, 1, 2>(x) : multiply_block<Unit, 1, 1>(x);
  });
}

void complete_units(const float* rows, int64_t stride, int64_t count, int64_t units, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < kTileUnits; c += VW) {
      store(to + i * kTileUnits + c, c < units ? load_partial(rows + i * stride + c, min(VW, units - c)) : zero());
    }
  }
}

void complete_rows(const float* rows, int64_t stride, int64_t count, int64_t vectors, float* to) {
  for (int64_t i = 0; i < kTileUnits; ++i) {
    for (int64_t v = 0; v < vectors; ++v) {
      store(to + i * 2 * VW + v * VW, i < count ? load(rows + i * stride + v * VW) : zero());
    }
  }
}

void multiply_tiles(const TileOperands& x, float* c, int64_t ldc) {
  const int64_t tile_rows = min(kTileRows, x.rows), whole = x.rows / tile_rows * tile_rows;
  if (!x.adds || whole == x.rows) {
    return walk_tiles(
        x, ldc, [&](int64_t, int64_t first, int64_t v) { return c + first * ldc + v * VW; },
        [](float*, int64_t, int64_t, int64_t, int64_t) {});
  }
  // The rows that are multiplied again must not be added again: the last tiles are made apart.
  alignas(64) float apart[kTileRows * 2 * VW];
  TileOperands part = x;
  part.rows = whole;
  multiply_tiles(part, c, ldc);
  const int64_t first = x.rows - tile_rows;
  part.a = x.a + first * x.lda;
  part.rows = tile_rows;
  for (int64_t v = 0; v < x.vectors; v += 2) {
    const auto copy = [&](int64_t from, auto move) {
      for (int64_t i = from; i < tile_rows; ++i) {
        for (int64_t j = v; j < min(v + 2, x.vectors); ++j) {
          move(c + (first + i) * ldc + j * VW, apart + (2 * i + j - v) * VW);
        }
      }
    };
    copy(0, [](const float* from, float* to) { store(to, load(from)); });
    part.b = x.b + v * VW;
    part.vectors = min(2, x.vectors - v);
    multiply_tiles(part, apart, 2 * VW);
    copy(whole - first, [](float* to, const float* from) { store(to, load(from)); });
  }
}

}  // namespace MMK_ISA
}  // namespace mmk

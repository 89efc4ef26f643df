// AMX's tiles of bfloat16 in plain C++, as the manual has them: rows and columns as configured, pairs summed apart,
// subnormals flushed, rounded to nearest. For test builds, on machines without AMX.
#include "csrc/cpu/tile_unit.h"

#ifdef MMK_TEST_ISA

#include <xmmintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mmk::portable_tiles {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
  bool configured = false;
  int64_t configurations = 0;
  TileConfiguration configuration;
  alignas(64) char tiles[kTiles][kRows][kRowBytes];
};
thread_local State state;

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "mmkernels: portable tiles: %s\n", what);
  std::abort();
}

void require(int tile) {
  if (!state.configured) fault("used while not configured");
  if (tile < 0 || tile >= kTiles || state.configuration.rows[tile] == 0) fault("a tile that is not configured");
}

int rows(int tile) { return state.configuration.rows[tile]; }
int row_bytes(int tile) { return state.configuration.row_bytes[tile]; }

float high_half(uint32_t unit) {
  const uint32_t bits = unit & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
float low_half(uint32_t unit) { return high_half(unit << 16); }

// Subnormals as zero, and to the nearest, whatever the thread has set.
class TileArithmetic {
 public:
  TileArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8000 | 0x0040); }
  ~TileArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

}  // namespace

void configure(const TileConfiguration& configuration) {
  if (configuration.palette != 1 || configuration.start_row != 0) fault("a palette that does not exist");
  for (int t = 0; t < 16; ++t) {
    const bool used = configuration.rows[t] != 0 || configuration.row_bytes[t] != 0;
    const bool fits = configuration.rows[t] <= kRows && configuration.row_bytes[t] <= kRowBytes &&
                      (configuration.rows[t] == 0) == (configuration.row_bytes[t] == 0);
    if ((t >= kTiles && used) || !fits) fault("a configuration that the CPU refuses");
  }
  state.configuration = configuration;
  state.configured = true;
  ++state.configurations;
  std::memset(state.tiles, 0xff, sizeof state.tiles);  // NaN: nobody may count on what a configuration leaves
}

void release() { state.configured = false; }

void zero(int tile) {
  require(tile);
  std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
}

void load(int tile, const void* from, int64_t stride_bytes) {
  require(tile);
  std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
  for (int i = 0; i < rows(tile); ++i) {
    std::memcpy(state.tiles[tile][i], static_cast<const char*>(from) + i * stride_bytes,
                static_cast<size_t>(row_bytes(tile)));
  }
}

void store(int tile, void* to, int64_t stride_bytes) {
  require(tile);
  for (int i = 0; i < rows(tile); ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride_bytes, state.tiles[tile][i], static_cast<size_t>(row_bytes(tile)));
  }
}

void dot(int sums, int a, int b) {
  require(sums);
  require(a);
  require(b);
  if (sums == a || sums == b || a == b) fault("a product of a tile with itself");
  if (rows(a) != rows(sums) || row_bytes(b) != row_bytes(sums) || rows(b) * 4 != row_bytes(a)) {
    fault("a product of tiles that do not fit");
  }
  const TileArithmetic arithmetic;
  const int columns = row_bytes(sums) / 4;
  alignas(64) float low[kRows][16], high[kRows][16];  // of B, as floats
  for (int k = 0; k < rows(b); ++k) {
    for (int n = 0; n < columns; ++n) {
      uint32_t unit;
      std::memcpy(&unit, state.tiles[b][k] + 4 * n, sizeof unit);
      low[k][n] = low_half(unit);
      high[k][n] = high_half(unit);
    }
  }
  for (int m = 0; m < rows(sums); ++m) {
    alignas(64) float even[16] = {}, odd[16] = {}, total[16];
    for (int k = 0; k < rows(b); ++k) {
      uint32_t unit;
      std::memcpy(&unit, state.tiles[a][m] + 4 * k, sizeof unit);
      const float x = low_half(unit), y = high_half(unit);
      for (int n = 0; n < 16; ++n) {  // a product of two bfloat16 is exact, so that each step rounds once
        even[n] += x * low[k][n];
        odd[n] += y * high[k][n];
      }
    }
    std::memcpy(total, state.tiles[sums][m], sizeof total);
    for (int n = 0; n < columns; ++n) total[n] += even[n] + odd[n];
    std::memcpy(state.tiles[sums][m], total, sizeof total);
  }
}

int64_t configurations() { return state.configurations; }
bool is_configured() { return state.configured; }

}  // namespace mmk::portable_tiles

#endif

// What multiplies pairs of bfloat16 beside the lanes of vectors: tiles, where the CPU has them. Torch-free.
#pragma once

#include <cstdint>

namespace mmk {

enum class TileUnit : int8_t {
  none,      // lanes alone
  amx,       // the CPU's tiles
  portable,  // the same four instructions in plain C++, in test builds
};

// The tiles of a thread while it works on the tasks of a call: TileScope of csrc/cpu/tiles.h writes it.
struct TileThread {
  TileUnit unit;
  int8_t rows;  // that tiles are configured for; 0 while they are not
};
extern __thread TileThread tile_thread;

// Whether tiles have ever been in use: where not, no product looks at its thread.
extern bool tiles_were_chosen;

// As ldtilecfg reads it.
struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

#ifdef MMK_TEST_ISA
// The portable tiles of this thread. What the CPU would answer with an exception ends the process.
namespace portable_tiles {
void configure(const TileConfiguration& configuration);
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t stride_bytes);
void store(int tile, void* to, int64_t stride_bytes);
void dot(int sums, int a, int b);
// A word about the thread's state, for tests: how many times it was configured, and whether it still is.
int64_t configurations();
bool is_configured();
}  // namespace portable_tiles
#endif

}  // namespace mmk

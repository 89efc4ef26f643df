// How a kernel, which knows nothing of torch, runs on torch's threads.
#pragma once

#include "csrc/cpu/tile_unit.h"

namespace mmk {

struct Workers {
  int count;
  // Calls body(context, worker) for worker = 0 … count-1, possibly at the same time, and returns when all are done.
  void (*run)(int count, void (*body)(void* context, int worker), void* context);
  TileUnit tiles = TileUnit::none;  // what they multiply pairs of bfloat16 on
};

}  // namespace mmk

// Products x_i·y_j of some rows with all columns, from which a contrastive loss takes sums and which it replaces by the
// gradient of its logits. Torch-free.
#pragma once

#include <cstdint>

#include "csrc/cpu/dtype.h"

namespace mmk {

struct PairTile {
  void* products = nullptr;  // [end_row][end_column], `stride` elements apart
  int64_t stride = 0;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, columns = 0;        // what is there; behind them zeros are written where gradients are
  int64_t end_row = 0, end_column = 0;  // even in half precision, for products in pairs
  int64_t first_row = 0;                // of the tile, among all
  int64_t first_target = 0;  // row i's positive is column first_target + i, in no column where that is outside
  float scale = 1.f;         // of the logits, above 0

  int64_t target(int64_t row) const { return first_target + first_row + row; }
};

}  // namespace mmk

// A matrix as products read it. Torch-free.
#pragma once

#include <cstdint>

namespace mmk {

struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;       // elements between rows, or between columns
  bool by_columns = false;  // whether the elements of a column are neighbours, and not those of a row
};

}  // namespace mmk

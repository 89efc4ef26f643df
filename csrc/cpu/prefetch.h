// Rows brought into cache before they are needed, a few at a time between tiles of arithmetic.
#pragma once

#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {

// Rows that are needed next, and within how many calls of step() they are to come.
struct RowsAhead {
  const void* first = nullptr;
  int64_t row_bytes = 0, stride_bytes = 0, rows = 0, steps = 1;
};

namespace {

class RowPrefetch {
 public:
  RowPrefetch() = default;
  // All of `rows` rows within `steps` calls of step().
  RowPrefetch(const void* first, int64_t row_bytes, int64_t stride_bytes, int64_t rows, int64_t steps)
      : at_(static_cast<const char*>(first)),
        row_bytes_(row_bytes),
        stride_(stride_bytes),
        left_(max(0, rows)),
        per_step_(ceil_div(left_, max(1, steps))) {}
  explicit RowPrefetch(const RowsAhead& x) : RowPrefetch(x.first, x.row_bytes, x.stride_bytes, x.rows, x.steps) {}

  template <bool kForWriting>
  MMK_INLINE void step() {
    for (int64_t n = min(per_step_, left_); n > 0; --n) {
      for (int64_t byte = 0; byte < row_bytes_; byte += kLine) __builtin_prefetch(at_ + byte, kForWriting, 2);
      at_ += stride_;
      --left_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_ = nullptr;
  int64_t row_bytes_ = 0, stride_ = 0, left_ = 0, per_step_ = 0;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// One side's rows in the lanes of vectors, packed once for a head: what products on tiles read them as whose other
// operand is the rows of the longer side, where they lie.
#pragma once

#include "csrc/bidirectional_cross_attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// [blocks of kSideBlock rows][units of features][kSideBlock], of the heads of a wave.
class LanePanels {
 public:
  LanePanels(const AttentionParams& p, const Rows& rows, int64_t length, int64_t features)
      : p_(p), rows_(rows), features_(features), size_(round_up(length, kSideBlock) * units<true>(features)) {}

  int64_t floats_per_head() const { return size_; }
  void use(float* memory) { memory_ = memory; }
  void pack(int64_t slot, int64_t b, int64_t h, int, int64_t first, int64_t count) const {
    pack_lanes(true, p_.dtype, row_address(rows_, p_.dtype, b, h, first), rows_.row, count, features_, at(slot, first),
               kSideBlock);
  }
  // A block from its first row on.
  float* at(int64_t slot, int64_t first) const { return memory_ + slot * size_ + first * units<true>(features_); }

 private:
  const AttentionParams& p_;
  const Rows& rows_;
  int64_t features_, size_;
  float* memory_ = nullptr;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// dK and dV while tasks add to them.
#pragma once

#include "csrc/attention/product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// dK or dV of the key heads of a wave: in the gradient itself where it can hold sums, else in float rows beside it.
class KeyGradient {
 public:
  void plan(const AttentionParams& p, bool values) {
    p_ = &p;
    values_ = values;
    features_ = values ? p.value_dim : p.head_dim;
    stride_ = round_up(features_, VW);
    for (int s = 0; s < p.key_segments; ++s) {
      at_[s] = size_;
      if (wanted(s) && !in_place()) size_ += p.keys[s].length * stride_;
    }
  }
  bool wanted(int s) const { return rows(s).data != nullptr; }
  bool in_place() const { return p_->dtype == Dtype::f32 && features_ % VW == 0; }
  int64_t floats_per_head() const { return size_; }
  void use(float* memory) { memory_ = memory; }

  struct View {
    float* sums;
    int64_t stride;
    Destination result;
  };
  View view(int64_t slot, int64_t b, int64_t h, int s, int64_t first) const {
    const Rows& r = rows(s);
    const Destination result{row_address(r, p_->dtype, b, h, first), p_->dtype, r.row, features_};
    if (in_place()) return {static_cast<float*>(result.data), r.row, result};
    return {memory_ + slot * size_ + at_[s] + first * stride_, stride_, result};
  }
  RowPrefetch prefetch(int64_t slot, int64_t b, int64_t h, const KeyBlock& keys, int64_t steps) const {
    if (!wanted(keys.index)) return {};
    const View v = view(slot, b, h, keys.index, keys.first);
    return {v.sums, features_ * 4, v.stride * 4, keys.count, steps};
  }
  void clear(const View& v, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      std::memset(v.sums + i * v.stride, 0, sizeof(float) * static_cast<size_t>(in_place() ? features_ : stride_));
  }
  void finish(const View& v, int64_t count) const {
    if (!in_place()) store_rows(v.result, v.sums, v.stride, count, nullptr);
  }

 private:
  const Rows& rows(int s) const { return values_ ? p_->keys[s].grad_value : p_->keys[s].grad_key; }

  const AttentionParams* p_ = nullptr;
  bool values_ = false;
  int64_t features_ = 0, stride_ = 0, size_ = 0;
  int64_t at_[kMaxSegments] = {};
  float* memory_ = nullptr;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

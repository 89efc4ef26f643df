// The softmax of a row of V logits, for kernels that take a row at a time:
//
//   p_c = exp(scale (z_c − top)) / total,   top = max z,   total = Σ exp(scale (z_c − top)),   scale > 0
//
// One pass over memory: each lane has a maximum and a sum of its own, which is brought to the new maximum once in
// kSoftmaxGroup vectors; the lanes meet at the end. The order is fixed by V alone. The maximum is taken off before the
// multiplication, so that what is rounded is the distance from it, however large the logits are. A logit of −inf has
// probability 0; one of +inf or NaN makes the row NaN, as in torch.
#pragma once

#include "csrc/cpu/element.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kSoftmaxGroup = 8;
constexpr float kLowest = -FLT_MAX;  // in place of −inf, whose distance from itself is no number

struct SoftmaxRow {
  float top;    // kLowest where all are −inf
  float total;  // 0 where all are −inf, else 1 or more

  // log Σ exp(scale z); −inf where all are.
  float lse(float scale) const { return scale * top + std::log(total); }
  // What exp(scale (z − top)) is multiplied by; 0 where all logits are −inf.
  float inverse() const { return total == 0.f ? 0.f : 1.f / total; }
};

// exp(x · scale), scale_log2e = scale · kLog2e: 0 for −inf.
MMK_INLINE vf exp_scaled(vf x, vf scale_log2e) { return exp2<5>(x * scale_log2e); }

// x with another number from lane n on.
MMK_INLINE vf filled_from(int64_t n, vf x, float filler) {
  if (n >= VW) return x;
  alignas(64) float lanes[VW];
  store(lanes, x);
  for (int64_t i = n; i < VW; ++i) lanes[i] = filler;
  return load(lanes);
}

// n elements, −inf behind them; nothing beyond is read.
template <class T>
MMK_INLINE vf load_logits(const T* z, int64_t n) {
  return n >= VW ? load_as_float(z) : filled_from(n, load_as_float(z, n), -kInfinity);
}

// f(c, Constant vectors) over `classes`: `kVectors` whole vectors at a time, then the others one by one, the last of
// which may be part of a vector.
template <int kVectors, class Function>
MMK_INLINE void for_logits(int64_t classes, Function f) {
  int64_t c = 0;
  for (; c + kVectors * VW <= classes; c += kVectors * VW) f(c, std::integral_constant<int, kVectors>{});
  for (; c < classes; c += VW) f(c, std::integral_constant<int, 1>{});
}

template <class T>
SoftmaxRow softmax_row(const T* z, int64_t classes, float scale) {
  const vf factor = set1(scale * kLog2e);
  vf top = set1(kLowest), total = zero();
  for_logits<kSoftmaxGroup>(classes, [&](int64_t c, auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    vf x[kVectors], sums[kVectors];
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) x[j] = load_logits(z + c + j * VW, classes - c - j * VW);
    vf most[kVectors];
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) most[j] = x[j];
    MMK_UNROLL for (int step = kVectors / 2; step > 0; step /= 2) {
      MMK_UNROLL for (int j = 0; j < step; ++j) most[j] = max(most[j], most[j + step]);
    }
    const vf raised = max(most[0], top);  // a NaN leaves the maximum as it is and enters the sum
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) sums[j] = exp_scaled(x[j] - raised, factor);
    MMK_UNROLL for (int step = kVectors / 2; step > 0; step /= 2) {
      MMK_UNROLL for (int j = 0; j < step; ++j) sums[j] = sums[j] + sums[j + step];
    }
    total = fma(total, exp_scaled(top - raised, factor), sums[0]);
    top = raised;
  });
  const float most = max_lane(top);
  return {most, sum(total * exp_scaled(top - set1(most), factor))};
}

// The softmax of a row whose SoftmaxRow is known, in vectors.
class Softmax {
 public:
  Softmax(const SoftmaxRow& row, float scale)
      : top_(set1(row.top)), factor_(set1(scale * kLog2e)), inverse_(set1(row.inverse())) {}
  MMK_INLINE vf of(vf z) const { return exp_scaled(z - top_, factor_) * inverse_; }

 private:
  vf top_, factor_, inverse_;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

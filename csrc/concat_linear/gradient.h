// What the backward of a linear layer over a concatenation is made from: dz and the sums over its rows.
#pragma once

#include "csrc/concat/backward.h"
#include "csrc/concat_linear/epilogue.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
class LinearGradient {
 public:
  static constexpr int kSums = 2;  // of db, of dgate
  static constexpr bool kFinishesRows = false, kFinishesWeights = false;

  LinearGradient(const ConcatLinearParams& p, const LinearEpilogue& epilogue) : p_(p), gate_(epilogue.gate()) {}

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    with_activation(p_.activation, [&](auto activation) {
      with_element_type(p_.sources.dtype, p_.out,
                        [&](auto* kept) { make_rows<decltype(activation)>(first, rows, dz, stride, sums, kept); });
    });
  }

  void columns(int64_t s, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    pack_source_columns<kPairs>(p_.sources.items[s], p_.sources.dtype, first, count, column, width, panels);
  }

  void finish_sums(const float* sums) const {
    const int64_t features = p_.sources.features, padded = round_up(features, VW);
    if (p_.grad_bias != nullptr) {
      with_element_type(p_.sources.dtype, p_.grad_bias, [&](auto* out) {
        for (int64_t c = 0; c < features; c += VW) store_from_float(out + c, load(sums + c), features - c);
      });
    }
    if (p_.grad_gate != nullptr) {
      for (int64_t c = 0; c < features; c += VW) {
        const vf t = load(gate_ + c);
        store_from_float(p_.grad_gate + c, load(sums + padded + c) * (set1(1.f) - t * t), features - c);
      }
    }
  }

 private:
  template <class Act, class T>
  void make_rows(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums, const T* out) const {
    const int64_t features = p_.sources.features, padded = round_up(features, VW);
    const auto* z = static_cast<const T*>(p_.preactivation);
    for (int64_t i = 0; i < rows; ++i) {
      const T* grad = reinterpret_cast<const T*>(row_address(p_.grad_out, p_.sources.dtype, first + i));
      const int64_t at = (first + i) * features;
      for (int64_t c = 0; c < features; c += VW) {
        const int64_t n = features - c;
        const vf dy = load_as_float(grad + c, n);
        vf slope = set1(1.f), value = zero();
        if (z != nullptr) {
          const vf x = load_as_float(z + at + c, n);
          if (Act::kFromOutput || gate_ != nullptr) value = Act::value(x);
          slope = Act::derivative(Act::kFromOutput ? value : x);
        } else if (out != nullptr) {
          slope = Act::derivative(load_as_float(out + at + c, n));
        }
        vf d = dy * slope;
        if (gate_ != nullptr) {
          d = d * load(gate_ + c);
          store(sums + padded + c, fma(dy, value, load(sums + padded + c)));
        }
        store(dz + i * stride + c, d);
        store(sums + c, load(sums + c) + d);
      }
    }
  }

  const ConcatLinearParams& p_;
  const float* gate_;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

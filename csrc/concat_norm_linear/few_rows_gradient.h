// The gradient of concat_norm_linear for one source of few rows, where every pass over the weight counts: dx̂ = dz W is
// there as a whole before dx is made, so that means and norm gradients are sums over its rows, and none over W.
//
//   dx = rstd · (a - mean(a) - x̂ · mean(a ∘ x̂)) of a = dx̂ ∘ g,  dg = Σ_rows dx̂ ∘ x̂,  dh = Σ_rows dx̂,  dW = dzᵀ (x̂ ∘ g +
//   h)
#pragma once

#include "csrc/concat_linear/gradient.h"
#include "csrc/concat_norm_linear/concat_norm_linear.h"
#include "csrc/concat_norm_linear/normalize.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
class FewRowsNormGradient {
 public:
  static constexpr int kSums = LinearGradient<kPairs>::kSums;
  static constexpr bool kFinishesRows = true, kFinishesWeights = false;

  static bool takes(const ConcatNormLinearParams& p) {
    const ConcatSources& sources = p.linear.sources;
    return sources.rows <= kBlockRows && sources.count == 1 && sources.items[0].grad.data != nullptr;
  }
  static int64_t floats(const ConcatNormLinearParams& p) { return 4 * vector_floats(p); }

  FewRowsNormGradient(const ConcatNormLinearParams& p, const LinearEpilogue& epilogue, float* memory)
      : p_(p), sources_(p.linear.sources), linear_(p.linear, epilogue) {
    Carver carver(memory);
    float* const gain = carver.take(vector_floats(p));
    float* const shift = carver.take(vector_floats(p));
    gains_ = carver.take(vector_floats(p));
    shifts_ = carver.take(vector_floats(p));
    std::memset(gains_, 0, sizeof(float) * static_cast<size_t>(2 * vector_floats(p)));
    gain_ = floats_of(sources_.dtype, p.norm_weight, 1, sources_.columns, gain);
    shift_ = floats_of(sources_.dtype, p.norm_bias, 1, sources_.columns, shift);
  }

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    linear_.make(first, rows, dz, stride, sums);
  }

  template <class T>
  void finish_rows(int64_t, int64_t first, int64_t rows, const float* dx, int64_t stride, T* out,
                   int64_t out_stride) const {
    const int64_t width = sources_.columns;
    for (int64_t i = 0; i < rows; ++i, dx += stride, out += out_stride) {
      const T* x = reinterpret_cast<const T*>(row_address(sources_.items[0].x, sources_.dtype, first + i));
      const Statistics s{p_.statistics[2 * (first + i)], p_.statistics[2 * (first + i) + 1]};
      const vf mean = set1(s.mean), rstd = set1(s.rstd);
      vf of_a = zero(), of_ax = zero();
      const auto add = [&](int64_t k, vf d, vf value) {
        const vf normalized = (value - mean) * rstd, a = d * load(gain_ + k);
        store(gains_ + k, fma(d, normalized, load(gains_ + k)));
        store(shifts_ + k, load(shifts_ + k) + d);
        of_a = of_a + a;
        of_ax = fma(a, normalized, of_ax);
      };
      const auto finish = [&](int64_t k, vf d, vf value, vf mean_a, vf mean_ax) {
        return (d * load(gain_ + k) - fma((value - mean) * rstd, mean_ax, mean_a)) * rstd;
      };
      const int64_t whole = width / VW * VW, rest = width - whole;
      for (int64_t k = 0; k < whole; k += VW) add(k, load(dx + k), load_as_float(x + k));
      if (rest > 0) add(whole, load_partial(dx + whole, rest), load_as_float(x + whole, rest));
      const vf mean_a = set1(p_.rms ? 0.f : sum(of_a) / static_cast<float>(width));
      const vf mean_ax = set1(sum(of_ax) / static_cast<float>(width));
      for (int64_t k = 0; k < whole; k += VW) {
        store_from_float(out + k, finish(k, load(dx + k), load_as_float(x + k), mean_a, mean_ax));
      }
      if (rest > 0) {
        const vf value = load_as_float(x + whole, rest);
        store_from_float(out + whole, finish(whole, load_partial(dx + whole, rest), value, mean_a, mean_ax), rest);
      }
    }
  }

  void columns(int64_t, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    const float* const shift = shift_ == nullptr ? nullptr : shift_ + column;
    pack_normalized_columns<kPairs>(sources_, 0, p_.statistics, {first, count, column, width}, gain_ + column, shift,
                                    panels);
  }

  void finish_sums(const float* sums) const {
    linear_.finish_sums(sums);
    write(p_.grad_norm_weight, gains_);
    write(p_.grad_norm_bias, shifts_);
  }

 private:
  static int64_t vector_floats(const ConcatNormLinearParams& p) { return round_up(p.linear.sources.columns + VW, 16); }

  void write(void* to, const float* from) const {
    if (to != nullptr) write_rows(from, 0, 1, sources_.columns, sources_.dtype, to, 0);
  }

  const ConcatNormLinearParams& p_;
  const ConcatSources& sources_;
  LinearGradient<kPairs> linear_;
  const float *gain_ = nullptr, *shift_ = nullptr;
  float *gains_ = nullptr, *shifts_ = nullptr;  // sums over rows
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// Of a block of S, which is formed once: the exponentials of both of its softmaxes.
#pragma once

#include "csrc/bidirectional_cross_attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// The softmax so far of one side's rows: exponents less `shift`, added up in `sum`.
struct Softmax {
  float *shift, *sum;

  void clear(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      shift[i] = -FLT_MAX;
      sum[i] = 0.f;
    }
  }
  void store_stats(const SoftmaxStats& to, int64_t row, int64_t count) const {
    if (to.shift == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      to.shift[row + i] = sum[i] == 0.f ? 0.f : shift[i];
      to.log2_sum[row + i] = sum[i] == 0.f ? kInfinity : std::log2(sum[i]);
    }
  }
};

// Clamp and scale of a group of lanes in place; `best` becomes the maximum of the rows that the lanes attend to.
template <int NR>
MMK_NOINLINE void finish_group(const Exponents& e, const uint8_t* visible, int64_t rows, float* scores,
                               vf (&best)[NR]) {
  MMK_UNROLL for (int j = 0; j < NR; ++j) best[j] = set1(-kInfinity);
  for (int64_t i = 0; i < rows; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      float* at = scores + i * kSideBlock + j * VW;
      vf s = load(at);
      if (e.finishes) store(at, s = e.finished(s));
      if (visible == nullptr || visible[i] != 0) best[j] = max(best[j], s);
    }
  }
}

// Probabilities of the side in the lanes, a group of them, less their new maxima; old_factor is what becomes of older
// sums. [rows][kSideBlock], or pairs of rows.
template <bool kPairs, int NR>
MMK_NOINLINE void take_lanes(const Exponents& e, const float* scores, const uint8_t* visible, int64_t rows,
                             const vf (&best)[NR], const Softmax& softmax, float* old_factor, float* out) {
  constexpr int kDegree = kPairs ? 3 : 5;
  vf scale[NR], minus_shift[NR], total[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    const vf old = load(softmax.shift + j * VW), raised = max(old, best[j] * set1(e.scale));
    scale[j] = set1(e.scale);
    store(old_factor + j * VW, exp2<5>(old - raised));
    store(softmax.shift + j * VW, raised);
    minus_shift[j] = -raised;
    total[j] = zero();
  }
  if (!e.finishes && any_is_huge(softmax.shift, NR * VW)) {
    round_huge_lanes<NR>(scores, softmax.shift, rows, scale, out);
    scores = out;
  }
  const auto at = [&](int64_t i, int j) {
    const bool hides = i >= rows || (visible != nullptr && visible[i] == 0);
    return hides ? zero() : exp2<kDegree>(fma(load(scores + i * kSideBlock + j * VW), scale[j], minus_shift[j]));
  };
  for (int64_t i = 0; i < rows; i += 2) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const vf even = at(i, j), odd = at(i + 1, j);
      total[j] = total[j] + (even + odd);
      if constexpr (kPairs) {
        store(out + i / 2 * kSideBlock + j * VW, pair(even, odd));
      } else {
        store(out + i * kSideBlock + j * VW, even);
        store(out + (i + 1) * kSideBlock + j * VW, odd);
      }
    }
  }
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    store(softmax.sum + j * VW, fma(load(softmax.sum + j * VW), load(old_factor + j * VW), total[j]));
  }
}

// The same of the side in the rows, over all lanes: [rows][kSideBlock], or pairs along the lanes.
template <bool kPairs, bool kHidden>
MMK_NOINLINE void take_rows(const Exponents& e, const float* scores, const float* hidden, int64_t rows, int64_t vectors,
                            const Softmax& softmax, float* old_factor, float* out) {
  constexpr int kDegree = kPairs ? 3 : 5;
  const vf scale = set1(e.scale);
  const auto visible = [&](const float* row, int64_t v) {
    const vf s = load(row + v * VW);
    if constexpr (kHidden) return select(load(hidden + v * VW) == zero(), s, set1(-kInfinity));
    return s;
  };
  const auto score = [&](int64_t i, int64_t v) { return visible(scores + i * kSideBlock, v); };
  for (int64_t first = 0; first < rows; first += VW) {
    vf r[VW];
    MMK_UNROLL for (int x = 0; x < VW; ++x) {
      const int64_t i = min(first + x, rows - 1);
      r[x] = score(i, 0);
      for (int64_t v = 1; v < vectors; ++v) r[x] = max(r[x], score(i, v));
    }
    const vf old = load(softmax.shift + first), raised = max(old, max_rows(r) * scale);
    const vf factor = exp2<5>(old - raised);
    store(old_factor + first, factor);
    store(softmax.shift + first, raised);
    for (int64_t x = 0; x < VW; ++x) {
      const int64_t i = first + x;
      r[x] = zero();
      if (i >= rows) continue;
      const vf minus_shift = set1(-softmax.shift[i]);
      const bool huge = !e.finishes && is_huge(softmax.shift[i]);
      alignas(64) float rounded[kSideBlock];
      if (huge) round_exponents(scores + i * kSideBlock, e.scale, vectors, rounded);
      const float* const row = huge ? rounded : scores + i * kSideBlock;
      const vf row_scale = huge ? set1(1.f) : scale;
      for (int64_t v = 0; v < vectors; ++v) {
        const vf p = exp2<kDegree>(fma(visible(row, v), row_scale, minus_shift));
        r[x] = r[x] + p;
        if constexpr (kPairs) {
          store_bf16(reinterpret_cast<uint16_t*>(out + i * (kSideBlock / 2)) + v * VW, p);
        } else {
          store(out + i * kSideBlock + v * VW, p);
        }
      }
    }
    store(softmax.sum + first, fma(load(softmax.sum + first), factor, sum_rows(r)));
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

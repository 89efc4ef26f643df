// What the two passes of bidirectional_cross_attention share: blocks of scores, and the exponents made of them.
#pragma once

#include "csrc/attention/product.h"
#include "csrc/attention/scores.h"
#include "csrc/bidirectional_cross_attention/bidirectional_cross_attention.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kSideBlock = 96;  // rows of x, and rows of y, of a block of scores
using BidirectionalBlocks = Blocks<kSideBlock / kLanes, kSideBlock>;

// Scores as exponents of 2.
struct Exponents {
  explicit Exponents(const BidirectionalParams& p)
      : clamp(p.clamp),
        clamps(p.clamp < kInfinity),
        finishes(clamps || !(p.attention.scale > 0.f)),
        product_scale(p.attention.scale),
        scale(finishes ? 1.f : p.attention.scale * kLog2e) {}

  // What is multiplied by `scale` to be an exponent: the product itself where it is scaled by a positive number alone.
  MMK_INLINE vf finished(vf product) const {
    const vf s = product * set1(product_scale);
    return (clamps ? max(set1(-clamp), min(set1(clamp), s)) : s) * set1(kLog2e);  // a NaN stays
  }
  // Whether the clamp lets a gradient pass.
  MMK_INLINE auto passes(vf product) const {
    const vf s = product * set1(product_scale);
    return max(s, -s) <= set1(clamp);
  }

  float clamp;
  bool clamps, finishes;
  float product_scale, scale;
};

// Exponents of x's lanes where their shift is huge, rounded before the shift is taken off them, as `raised` was;
// elsewhere what they are made of. `scale` becomes what is left to multiply by.
template <int NR>
MMK_NOINLINE void round_huge_lanes(const float* scores, const float* shift, int64_t keys, vf (&scale)[NR], float* to) {
  for (int64_t i = 0; i < keys; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const int64_t at = i * kSideBlock + j * VW;
      const vf s = load(scores + at);
      store(to + at, select(is_huge(load(shift + j * VW)), s * scale[j], s));
    }
  }
  MMK_UNROLL for (int j = 0; j < NR; ++j) { scale[j] = select(is_huge(load(shift + j * VW)), set1(1.f), scale[j]); }
}

// The same of a row of y.
MMK_NOINLINE inline void round_exponents(const float* scores, float scale, int64_t vectors, float* to) {
  for (int64_t v = 0; v < vectors; ++v) store(to + v * VW, load(scores + v * VW) * set1(scale));
}

// Lanes of a side's block that the other attends to, as 0 or -inf: [kSideBlock]; the mask is that of the block's rows.
// Whether any is hidden.
inline bool hidden_lanes(const uint8_t* mask, int64_t count, int64_t vectors, float* hidden) {
  bool any = false;
  for (int64_t i = 0; i < vectors * VW; ++i) {
    const bool hides = i >= count || (mask != nullptr && mask[i] == 0);
    hidden[i] = hides ? -kInfinity : 0.f;
    any |= hides;
  }
  return any;
}

// Rows of a block of x that y attends to, or null: all of them.
inline const uint8_t* visible_queries(const BidirectionalParams& p, const QueryBlock& q, int64_t b) {
  return p.x_mask == nullptr ? nullptr : p.x_mask + b * q.segment->length + q.first;
}

// Keys of a block that x attends to, or null: all of them.
inline const uint8_t* visible_keys(const BidirectionalParams& p, const KeyBlock& k, int64_t b) {
  return p.y_mask == nullptr ? nullptr : p.y_mask + b * k.segment->length + k.first;
}

// Products X Yᵀ of a block, [keys][kSideBlock], group by group of lanes; f(Constant<vectors>, lane, best) after each,
// best being the maxima of the group's lanes.
template <bool kPairs, class Function, class Between>
MMK_INLINE void for_score_groups(const AttentionParams& p, const QueryBlock& q, const float* query_lanes, Panel keys,
                                 int64_t count, float* scores, Between between_tiles, Function f) {
  const int64_t groups = ceil_div(q.vectors, kScoreVectors);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = q.vectors * g / groups, lane = begin * VW;
    with_constant<kScoreVectors>(q.vectors * (g + 1) / groups - begin, [&](auto vectors) {
      constexpr int NR = static_cast<int>(vectors);
      vf best[NR];
      MMK_UNROLL for (int j = 0; j < NR; ++j) best[j] = set1(-kInfinity);
      multiply_scores<kPairs, false, NR, kSideBlock>(keys, count, query_lanes + lane, units<kPairs>(p.head_dim),
                                                     scores + lane, best, {}, between_tiles);
      f(vectors, lane, best);
    });
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

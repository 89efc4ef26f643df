// One block of scores Sᵀ [keys][lanes], queries in the lanes: the product, and everything between it and the softmax.
//
// A row of the block is `stride` floats long; a group of NR vectors of lanes is worked on at a time.
#pragma once

#include "csrc/attention/mask.h"
#include "csrc/attention/pack.h"
#include "csrc/cpu/philox.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Probabilities are made as 2^(exponent_scale · S - shift), where shift is row_max · log2e, rounded: one rounding in
// all, so that their error does not grow with the scores. A shift is finite, so that a difference of two is never NaN.
MMK_INLINE float exponent_shift(float row_max) {
  const float shift = row_max * kLog2e;
  return shift < -FLT_MAX ? -FLT_MAX : shift;
}
MMK_INLINE vf exponent_shift(vf row_max) { return max(set1(-FLT_MAX), row_max * set1(kLog2e)); }
// What to add to scores as exponents of 2: their bias, less the shift.
MMK_INLINE vf bias_less_shift(float bias, vf shift) { return fma(set1(bias), set1(kLog2e), -shift); }
// Where scores are so large that the rounding of a shift is no small number of exponents, the difference of a score and
// row_max is formed first, both rounded alike, so that no exponent is above 0 and the largest is 0. A row_max of
// -FLT_MAX is that of a row without scores. Scores that are scaled first are exponents by then, and need none of this.
constexpr float kHugeScore = 67108864.f;  // 2^26: shifts are multiples of 8
MMK_INLINE bool is_huge(float row_max) {
  const float size = std::fabs(row_max);
  return size > kHugeScore && size < FLT_MAX;
}
MMK_INLINE vi is_huge(vf row_max) {
  const vf size = max(-row_max, row_max);
  return (size > set1(kHugeScore)) & (size < set1(FLT_MAX));
}
inline bool any_is_huge(const float* row_max, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) any |= is_huge(row_max[i]);
  return any;
}
// What becomes of sums of exponentials when the maximum goes up.
MMK_INLINE float factor_of_older(float row_max, float raised) {
  return std::exp2(is_huge(raised) ? (row_max - raised) * kLog2e : exponent_shift(row_max) - exponent_shift(raised));
}
// A score as an exponent of 2; one of -inf stays hidden.
MMK_INLINE vf exponent_or_hidden(vf s) { return select(s == set1(-kInfinity), s, exponent_shift(s)); }

// A float mask's full tile of entries and the scale that precede it, as much as a tile of scores needs to be finished
// at once.
struct ScaleAndMask {
  float scale;
  const float* entries;  // laid out as the scores
};

// scale · S + entry; -inf hides whatever it is added to.
MMK_INLINE vf masked_score(vf s, vf scale, vf entry) {
  return select(entry == set1(-kInfinity), entry, fma(s, scale, entry));
}

// With kMask the scores are finished: best is their maximum, what is stored is exponents of 2.
template <bool kPairs, bool kMask, int MR, int NR, int kStride>
MMK_NOINLINE void score_tile(Panel key, const float* query_lanes, int64_t depth, float* scores, vf (&best)[NR],
                             const ScaleAndMask& mask) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, key.data, key.stride, Constant<1>{}, query_lanes, Constant<kStride>{}, depth);
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    vf top = best[j];
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const int64_t at = r * kStride + j * VW;
      vf s = acc[r][j];
      if constexpr (kMask) s = masked_score(s, set1(mask.scale), load(mask.entries + at));
      top = max(top, s);
      store(scores + at, kMask ? exponent_or_hidden(s) : s);
    }
    best[j] = top;
  }
}

// The end of `score_tile` for scores that lie in memory as tiles left them.
template <bool kMask, int NR, int kStride>
MMK_INLINE void finish_tiled_scores(int64_t keys, float* scores, vf (&best)[NR], const ScaleAndMask& mask) {
  vf top[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) top[j] = best[j];
  for (int64_t i = 0; i < keys; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const int64_t at = i * kStride + j * VW;
      vf s = load(scores + at);
      if constexpr (kMask) s = masked_score(s, set1(mask.scale), load(mask.entries + at));
      top[j] = max(top[j], s);
      if constexpr (kMask) store(scores + at, exponent_or_hidden(s));
    }
  }
  MMK_UNROLL for (int j = 0; j < NR; ++j) best[j] = top[j];
}

// S[keys][NR·VW] = K · Qᵀ; best[j] becomes the maximum of itself and the scores in its lane. Calls between_tiles() once
// per tile, of which there are keys / score_rows(NR). With kMask as score_tile.
template <bool kPairs, bool kMask, int NR, int kStride, class Function>
MMK_INLINE void multiply_scores(Panel key, int64_t keys, const float* query_lanes, int64_t depth, float* scores,
                                vf (&best)[NR], const ScaleAndMask& mask, Function between_tiles) {
  if constexpr (kPairs) {
    if (has_tiles()) {
      // Rows of two tiles, which K is read once for; the last ones leave no tile short.
      for (int64_t i = 0, rows; i < keys; i += rows) {
        rows = keys - i < 3 * kTileRows ? keys - i : 2 * kTileRows;
        for (int64_t x = 0; x < rows; x += score_rows(NR)) between_tiles();
        float* const to = scores + i * kStride;
        multiply_tiles({key.data + i * key.stride, key.stride, rows, query_lanes, kStride, depth, NR}, to, kStride);
        finish_tiled_scores<kMask, NR, kStride>(rows, to, best, {mask.scale, mask.entries + i * kStride});
      }
      return;
    }
  }
  for_runs<score_rows(NR)>(keys, [&](auto rows, int64_t i) {
    between_tiles();
    score_tile<kPairs, kMask, static_cast<int>(rows), NR, kStride>({key.data + i * key.stride, key.stride}, query_lanes,
                                                                   depth, scores + i * kStride, best,
                                                                   {mask.scale, mask.entries + i * kStride});
  });
}

// What of a block of keys the queries of `q` may attend to, `any` being their window; no keys if nothing. Without a
// segment of queries no bias is looked at.
template <bool kPairs>
ScoreBlock score_block(const AttentionParams& p, const KeyBlock& k, Range any, const QueryBlock& q, int64_t b,
                       int64_t h) {
  Range range{max(0, any.begin - k.position), min(k.count, valid_keys(*k.segment, b) - k.first)};
  range.end = min(range.end, any.end - k.position);
  if (range.size() == 0) return {};
  const float bias = q.segment == nullptr ? 0.f : bias_of(p, h, q.segment, k.segment);
  if (bias == -kInfinity) return {};
  // Pairs of keys start at an even one, and what a tile adds up does not depend on where a window begins.
  if (kPairs) range.begin &= has_tiles() ? -2 * kTileUnits : -2;
  return {b,
          h,
          h / (p.heads / p.kv_heads),
          k.segment,
          k.first + range.begin,
          k.position + range.begin,
          range.size(),
          q.position,
          q.count,
          bias};
}

// Which of the steps between product and softmax a call needs.
struct ScoreSteps {
  explicit ScoreSteps(const AttentionParams& p) {
    for (const AttentionMask* mask : {&p.mask, &p.second_mask})
      float_mask |= mask->data != nullptr && mask->dtype != Dtype::boolean;
    // Scores are scaled before a step that needs their value, or when the maximum would not survive the scaling;
    // else the scale is part of the exponent.
    scale_first = p.softcap > 0.f || float_mask || !(p.scale > 0.f);
    softcap = p.softcap > 0.f;
    for (int s = 0; s < p.key_segments; ++s) poisoned |= p.keys[s].poisoned != nullptr;
    always = scale_first || p.mask.data != nullptr || poisoned;
    score_scale = scale_first ? 1.f : p.scale;
    exponent_scale = scale_first ? 1.f : p.scale * kLog2e;
  }

  // What the rounding of a row's shift hides from row_max, and log_sum has to make up for.
  float hidden_by_shift(float row_max) const {
    const float shift = exponent_shift(row_max);
    if (scale_first || is_huge(row_max) || shift == -FLT_MAX) return 0.f;
    return static_cast<float>(shift * 0.6931471805599453 - row_max);
  }

  // A sink as an exponent of 2 less the shift of its row, rounded as scores are.
  float sink_exponent(float sink, float row_max) const {
    if (!scale_first && is_huge(row_max)) return (sink - row_max) * kLog2e;
    const float exponent = exponent_shift(sink), shift = exponent_shift(row_max);
    return scale_first || exponent == -FLT_MAX ? exponent - shift : std::fma(sink, kLog2e, -shift);
  }

  // What of a block's bias is not yet in its finished scores.
  float late_bias(float bias) const { return scale_first ? 0.f : bias; }

  // Whether all there is to do is to scale and to add a float mask's entries, but for a window.
  bool only_mask() const { return float_mask && !softcap && !poisoned; }

  bool float_mask = false, scale_first, softcap, poisoned = false, always;
  float score_scale;     // what is left to multiply a maximum by
  float exponent_scale;  // what is left to multiply a finished score by to make it an exponent of 2
};

// A row's softmax before its first key: empty, or the sink alone.
struct SoftmaxStart {
  float row_max = -FLT_MAX, sum = 0.f;

  // `first`: whether this is the first part of the keys, the one that takes the sink.
  SoftmaxStart(const AttentionParams& p, const ScoreSteps& steps, int64_t h, bool first) {
    if (p.sinks == nullptr || !first || p.sinks[h] == -kInfinity) return;
    row_max = p.sinks[h];
    sum = std::exp2(steps.sink_exponent(row_max, row_max));
  }
};

// Scale, softcap, mask and window, in place, and the way to an exponent of 2 where the scale came first; `best`
// receives the maximum of each lane before that. `capped`, if set, receives the scores after softcap, for its backward.
template <int NR, int kStride>
void finish_scores(const AttentionParams& p, const ScoreSteps& steps, const ScoreBlock& block, const Window& window,
                   const MaskTile& mask, int64_t lane, float* scores, float* capped, vf (&best)[NR]) {
  const float scale_or_1 = steps.scale_first ? p.scale : 1.f;
  const vf scale = set1(scale_or_1), cap = set1(p.softcap);
  vf first[NR], last[NR];  // positions of the first and last key that the query in a lane attends to
  const bool windowed = window.bounded(), biased = steps.scale_first && block.bias != 0.f;
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    alignas(64) float begin[VW] = {}, end[VW] = {};
    for (int x = 0; windowed && x < VW; ++x) {
      const int64_t query = block.query + lane + j * VW + x;
      begin[x] = static_cast<float>(max(-1, min(block.keys, window.begin(query) - block.key)));
      end[x] = static_cast<float>(max(-1, min(block.keys, window.end(query) - block.key)));
    }
    first[j] = load(begin);
    last[j] = load(end);
    best[j] = set1(-kInfinity);
  }
  const uint8_t* poisoned = block.segment->poisoned;
  if (poisoned != nullptr) {
    poisoned += number_at(p, *block.segment, p.kv_heads, block.b, block.kv_head, block.key_in_segment);
  }
  for (int64_t i = 0; i < block.keys; ++i) {
    const vf index = set1(static_cast<float>(i));
    const bool poison = poisoned != nullptr && poisoned[i] != 0;
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      float* at = scores + i * kStride + j * VW;
      vf s = poison ? set1(NAN) : load(at), factor = scale;
      if (steps.softcap) {
        s = cap * tanh(s * scale / cap);
        factor = set1(1.f);
        if (capped != nullptr) store(capped + i * kStride + j * VW, s);
      }
      if (mask.kind != MaskTile::none) {
        const vf entry = mask.kind == MaskTile::per_key     ? set1(mask.entries[i])
                         : mask.kind == MaskTile::per_query ? load(mask.entries + lane + j * VW)
                                                            : load(mask.entries + i * kStride + lane + j * VW);
        s = masked_score(s, factor, entry);
      } else {
        s = s * factor;
      }
      if (biased) s = s + set1(block.bias);
      if (windowed) {
        s = select(index < first[j], set1(-kInfinity), s);
        s = select(index >= last[j], set1(-kInfinity), s);
      }
      best[j] = max(best[j], s);
      if (steps.scale_first) s = exponent_or_hidden(s);
      store(at, s);
    }
  }
}

// Scores as exponents of 2, in place, for a call in which some are huge: where they are, less row_max and more exactly
// so than by a shift, elsewhere as everywhere else.
template <int NR, int kStride>
MMK_NOINLINE void make_huge_exponents(const ScoreSteps& steps, float bias, const float* row_max,
                                      const vf (&minus_shift)[NR], int64_t keys, float* scores) {
  const vf score_scale = set1(steps.score_scale), exponent_scale = set1(steps.exponent_scale), b = set1(bias);
  for (int64_t i = 0; i < keys; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      float* const at = scores + i * kStride + j * VW;
      const vf s = load(at), top = load(row_max + j * VW);
      const vf exact = (fma(s, score_scale, b) - top) * set1(kLog2e);
      store(at, select(is_huge(top), exact, fma(s, exponent_scale, minus_shift[j])));
    }
  }
}

// Factors [keys][lanes] of the probabilities: 0 where dropped, else 1 / (1 - p). Words of one counter serve four keys.
inline void dropout_factors(const AttentionParams& p, const ScoreBlock& block, int64_t lanes, int64_t stride,
                            float* factors) {
  const double threshold = std::floor(static_cast<double>(p.dropout_p) * 4294967296.0);
  const float kept = p.dropout_p < 1.f ? 1.f / (1.f - p.dropout_p) : 0.f;
  const auto head = static_cast<uint32_t>(block.b * p.heads + block.h);
  for (int64_t x = 0; x < lanes; x += VW) {
    uint32_t words[4][VW];
    for (int64_t i = 0; i < block.keys; ++i) {
      const int64_t key = block.key + i;
      if (i == 0 || key % 4 == 0) {
        philox(p.seed, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(block.query + x), head, p.offset, words);
      }
      for (int y = 0; y < VW; ++y) factors[i * stride + x + y] = words[key % 4][y] >= threshold ? kept : 0.f;
    }
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

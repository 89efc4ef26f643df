// One block of scores in the backward: from S to P and dS, and what is added to dK, dV and the gradients of bias and
// mask.
#pragma once

#include "csrc/attention/key_gradient.h"
#include "csrc/attention/mask_gradient.h"
#include "csrc/attention/product.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kQueryBlock = 96, kKeyBlock = 96;
using BackwardBlocks = Blocks<kQueryBlock / kLanes, kKeyBlock>;

struct RowStats {
  alignas(64) float row_max[kQueryBlock], shift[kQueryBlock], log2_sum[kQueryBlock], delta[kQueryBlock],
      grad_log_sum[kQueryBlock];
  bool huge;  // whether some row_max is

  // dS of a row's sink: all of a row's dS add up to d log_sum.
  float sink_gradient(const ScoreSteps& steps, float sink, int64_t i) const {
    if (sink == -kInfinity || log2_sum[i] == kInfinity) return 0.f;
    return -std::exp2(steps.sink_exponent(sink, row_max[i]) - log2_sum[i]) * delta[i];
  }
};

// What a worker needs for one task. The layouts named pairs exist for products on bfloat16 pairs only.
struct BackwardTile {
  float *query_lanes, *grad_lanes, *query_columns, *grad_columns;  // Qᵀ and dOᵀ; Q and dO
  float *scores, *ds;                                              // [keys][kQueryBlock]: S, then P; dP, then dS
  float *p_pairs, *ds_pairs;                                       // [keys][kQueryBlock / 2], pairs of queries
  float* ds_key_pairs;                                             // [keys / 2][kQueryBlock], pairs of keys
  float* dq;                                                       // [queries][features]
  float *mask, *second_mask, *dropped, *capped;                    // [keys][kQueryBlock]
  float* mask_key_sums;                                            // [keys]
  float* bias_sums;  // [key segments][2][kQueryBlock]: sums of dS and of P

  template <bool kPairs>
  static BackwardTile carve(const AttentionParams& p, Carver& memory) {
    const int64_t block = (kKeyBlock + 1) * kQueryBlock, pairs = kPairs ? block : 0;
    const int64_t d = round_up(p.head_dim, VW), dv = round_up(p.value_dim, VW);
    BackwardTile t;
    t.query_lanes = memory.take(d * kQueryBlock);
    t.grad_lanes = memory.take(dv * kQueryBlock);
    t.query_columns = memory.take(d * kQueryBlock);
    t.grad_columns = memory.take(dv * kQueryBlock);
    t.scores = memory.take(block);
    t.ds = memory.take(block);
    t.p_pairs = memory.take(pairs / 2);
    t.ds_pairs = memory.take(pairs / 2);
    t.ds_key_pairs = memory.take(pairs / 2 + kQueryBlock);
    t.dq = memory.take(d * kQueryBlock);
    t.mask = memory.take(p.mask.data != nullptr ? block : 0);
    t.second_mask = memory.take(p.second_mask.data != nullptr ? block : 0);
    t.dropped = memory.take(p.dropout_p > 0.f ? block : 0);
    t.capped = memory.take(p.softcap > 0.f ? block : 0);
    t.mask_key_sums = memory.take(kKeyBlock + VW);
    t.bias_sums = memory.take(p.bias.grad != nullptr ? 2 * kMaxSegments * kQueryBlock : 0);
    return t;
  }
};

struct BackwardCall {
  const AttentionParams& p;
  ScoreSteps steps;
  BackwardBlocks longest;
  int64_t parts;
  bool want_query = false, sinks_alone = false;  // gradients: the queries' of some segment; none but the sinks'
  Panels keys, values;
  KeyGradient grad_key, grad_value;
  MaskGradientSum grad_mask;
  int32_t* turns = nullptr;    // [heads of the wave][key blocks]
  uint8_t* started = nullptr;  // the same: whether the sums of a block hold something

  explicit BackwardCall(const AttentionParams& params)
      : p(params),
        steps(params),
        longest(params),
        parts(longest.query_blocks == 1 && p.bias.grad == nullptr ? key_parts(p.batch * p.heads, longest.key_blocks, 4)
                                                                  : 1),
        grad_mask(params, longest.query_blocks, longest.key_blocks, parts) {
    for (int s = 0; s < p.query_segments; ++s) want_query |= p.queries[s].grad_query.data != nullptr;
  }
  // Whether dS of two segments serves anything, and whether anything else of them does.
  bool wants_ds(const QuerySegment& q, int keys) const {
    return q.grad_query.data != nullptr || grad_key.wanted(keys) || grad_mask.wanted() || p.bias.grad != nullptr;
  }
  bool wants(const QuerySegment& q, int keys) const { return wants_ds(q, keys) || grad_value.wanted(keys); }
  bool wants_sinks_alone() const {
    bool other = false;
    for (int q = 0; q < p.query_segments; ++q) {
      for (int k = 0; k < p.key_segments; ++k) other |= wants(p.queries[q], k);
    }
    return p.grad_sinks != nullptr && !other;
  }
};

struct Task {
  int64_t b, h, kv_head, slot, t, part;
  int32_t rank;  // among the tasks of its key head, which add to the same dK and dV
  bool last;     // of them
};

// Replaces scores by probabilities [keys][NR·VW]; with dropout, `dropped` goes from the factors to P times the factors.
template <bool kPairs, bool kMasked, int NR>
MMK_NOINLINE void make_probabilities(const BackwardTile& tile, int64_t lane, int64_t keys, const ScoreSteps& steps,
                                     float bias, const RowStats& stats, bool dropout) {
  constexpr int kDegree = kPairs ? 3 : 5;
  vf scale = set1(steps.exponent_scale), minus_shift[NR], log2_sum[NR];
  bias = steps.late_bias(bias);
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    minus_shift[j] = bias_less_shift(bias, load(stats.shift + lane + j * VW));
    log2_sum[j] = load(stats.log2_sum + lane + j * VW);
  }
  if (stats.huge) {
    make_huge_exponents<NR, kQueryBlock>(steps, bias, stats.row_max + lane, minus_shift, keys, tile.scores + lane);
    scale = set1(1.f);
    MMK_UNROLL for (int j = 0; j < NR; ++j) minus_shift[j] = zero();
  }
  for (int64_t i = 0; i < keys; ++i) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const int64_t x = lane + j * VW;
      const vf s = load(tile.scores + i * kQueryBlock + x);
      vf p = exp2<kDegree>(fma(s, scale, minus_shift[j]) - log2_sum[j]);
      if constexpr (kMasked) p = select(s == set1(-kInfinity), zero(), p);  // also in a row of NaN
      vf kept = p;
      store(tile.scores + i * kQueryBlock + x, p);
      if (dropout) {
        kept = p * load(tile.dropped + i * kQueryBlock + x);
        store(tile.dropped + i * kQueryBlock + x, kept);
      }
      if constexpr (kPairs) store_bf16(reinterpret_cast<uint16_t*>(tile.p_pairs + i * (kQueryBlock / 2)) + x, kept);
    }
  }
}

template <bool kPairs, int MR, int NR>
MMK_NOINLINE void ds_tile(Panel value, const float* grad_lanes, int64_t depth, const float* p, const float* kept,
                          const float* delta, float* ds) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, value.data, value.stride, Constant<1>{}, grad_lanes, Constant<kQueryBlock>{}, depth);
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    const vf d = load(delta + j * VW);
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const int64_t at = r * kQueryBlock + j * VW;
      const vf probability = load(p + at);
      // a probability of 0 stays a gradient of 0 even where dP is not finite
      const vf x = kept == p ? probability * (acc[r][j] - d) : load(kept + at) * acc[r][j] - probability * d;
      store(ds + at, select(probability == zero(), zero(), x));
    }
  }
}

// The end of `ds_tile` for a dP that lies in memory as tiles left it.
template <int NR>
MMK_NOINLINE void finish_tiled_ds(int64_t keys, const float* p, const float* kept, const float* delta, float* ds) {
  vf d[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) d[j] = load(delta + j * VW);
  for (int64_t at = 0; at < keys * kQueryBlock; at += kQueryBlock) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const vf dp = load(ds + at + j * VW), probability = load(p + at + j * VW);
      const vf x = kept == p ? probability * (dp - d[j]) : load(kept + at + j * VW) * dp - probability * d[j];
      store(ds + at + j * VW, select(probability == zero(), zero(), x));
    }
  }
}

// dSᵀ of a group of lanes, complete up to the scale; and its share of the gradients of bias and mask.
template <bool kPairs, int NR>
void make_ds(const BackwardCall& call, const Task& task, const ScoreBlock& block, int64_t j, Panel value, int64_t lane,
             const BackwardTile& tile, const RowStats& stats) {
  const AttentionParams& p = call.p;
  const float* kept = (p.dropout_p > 0.f ? tile.dropped : tile.scores) + lane;
  const int64_t depth = units<kPairs>(p.value_dim);
  if (kPairs && has_tiles()) {
    multiply_tiles({value.data, value.stride, block.keys, tile.grad_lanes + lane, kQueryBlock, depth, NR},
                   tile.ds + lane, kQueryBlock);
    finish_tiled_ds<NR>(block.keys, tile.scores + lane, kept, stats.delta + lane, tile.ds + lane);
  } else {
    for_runs<score_rows(NR)>(block.keys, [&](auto rows, int64_t i) {
      const int64_t at = i * kQueryBlock;
      ds_tile<kPairs, static_cast<int>(rows), NR>({value.data + i * value.stride, value.stride}, tile.grad_lanes + lane,
                                                  depth, tile.scores + lane + at, kept + at, stats.delta + lane,
                                                  tile.ds + lane + at);
    });
  }
  if (p.bias.grad != nullptr) {
    float* const sums = tile.bias_sums + 2 * kQueryBlock * (block.segment - p.keys) + lane;
    vf ds_sum[NR], p_sum[NR];
    MMK_UNROLL for (int v = 0; v < NR; ++v) {
      ds_sum[v] = load(sums + v * VW);
      p_sum[v] = load(sums + kQueryBlock + v * VW);
    }
    for (int64_t i = 0; i < block.keys; ++i) {
      MMK_UNROLL for (int v = 0; v < NR; ++v) {
        const int64_t at = i * kQueryBlock + lane + v * VW;
        ds_sum[v] = ds_sum[v] + load(tile.ds + at);
        p_sum[v] = p_sum[v] + load(tile.scores + at);
      }
    }
    MMK_UNROLL for (int v = 0; v < NR; ++v) {
      store(sums + v * VW, ds_sum[v]);
      store(sums + kQueryBlock + v * VW, p_sum[v]);
    }
  }
  const bool mask_from_pairs = kPairs && call.grad_mask.takes_pairs() && !(p.softcap > 0.f);
  if (call.grad_mask.wanted() && !call.grad_mask.same_for_all_keys() && !mask_from_pairs) {
    if (call.grad_mask.same_for_all_queries()) {
      for (int64_t i = 0; i < block.keys; ++i) {
        vf total = zero();
        MMK_UNROLL for (int v = 0; v < NR; ++v) total = total + load(tile.ds + i * kQueryBlock + lane + v * VW);
        tile.mask_key_sums[i] += sum(total);
      }
    } else {
      call.grad_mask.wait({task.b, task.h, task.t, task.part, j});
      call.grad_mask.add_full(block, tile.ds, kQueryBlock, lane, NR * VW);
    }
  }
  if (p.softcap > 0.f) {
    const vf inverse = set1(1.f / p.softcap);
    for (int64_t i = 0; i < block.keys; ++i) {
      MMK_UNROLL for (int v = 0; v < NR; ++v) {
        const int64_t at = i * kQueryBlock + lane + v * VW;
        const vf t = load(tile.capped + at) * inverse;
        store(tile.ds + at, load(tile.ds + at) * (set1(1.f) - t * t));
      }
    }
  }
  if constexpr (kPairs) {
    for (int64_t i = 0; i < block.keys; i += 2) {
      MMK_UNROLL for (int v = 0; v < NR; ++v) {
        const int64_t x = lane + v * VW;
        const vf even = load(tile.ds + i * kQueryBlock + x);
        const vf odd = i + 1 < block.keys ? load(tile.ds + (i + 1) * kQueryBlock + x) : zero();
        auto* halves = reinterpret_cast<uint16_t*>(tile.ds_pairs + i * (kQueryBlock / 2)) + x;
        store_bf16(halves, even);
        store_bf16(halves + kQueryBlock, odd);
        store(tile.ds_key_pairs + i / 2 * kQueryBlock + x, pair(even, odd));
      }
    }
    if (mask_from_pairs) {
      call.grad_mask.wait({task.b, task.h, task.t, task.part, j});
      call.grad_mask.add_pairs(block, tile.ds_key_pairs, kQueryBlock, lane, NR * VW);
    }
  }
}

// A task's share of the gradient of the segments' bias. The dS of a row add up to d log_sum; what they miss comes of
// the rounding of O in δ, which entered each as P times one number, and is taken out again.
inline void finish_bias_sums(const AttentionParams& p, const BackwardTile& tile, const RowStats& stats, int64_t lanes,
                             float* shares) {
  alignas(64) vf total[kMaxSegments] = {};
  for (int64_t lane = 0; lane < lanes; lane += VW) {
    const float* const sums = tile.bias_sums + lane;
    vf excess = -load(stats.grad_log_sum + lane);
    for (int s = 0; s < p.key_segments; ++s) excess = excess + load(sums + 2 * kQueryBlock * s);
    for (int s = 0; s < p.key_segments; ++s) {
      const vf ds = load(sums + 2 * kQueryBlock * s), p_sum = load(sums + 2 * kQueryBlock * s + kQueryBlock);
      total[s] = total[s] + select(p_sum == zero(), ds, fma(-excess, p_sum, ds));
    }
  }
  for (int s = 0; s < p.key_segments; ++s) shares[s] = sum(total[s]);
}

// dK and dV of a block of keys: each task in its turn.
template <bool kPairs>
void add_key_gradients(const BackwardCall& call, const Task& task, const KeyBlock& keys, const ScoreBlock& block,
                       int64_t j, Panel query, Panel grad, int64_t queries, const BackwardTile& tile) {
  constexpr int64_t kStride = kPairs ? kQueryBlock / 2 : kQueryBlock;
  const int64_t at = task.slot * call.longest.key_blocks + j;
  wait_turn(call.turns + at, task.rank);
  const auto add = [&](const KeyGradient& gradient, const float* a, float factor, Panel columns, int64_t features) {
    if (!gradient.wanted(keys.index)) return;
    const KeyGradient::View v = gradient.view(task.slot, task.b, task.kv_head, keys.index, keys.first);
    const bool covers = block.keys == keys.count;
    if (!call.started[at] && !covers) gradient.clear(v, keys.count);
    if (block.keys > 0) {
      float* sums = v.sums + (block.key_in_segment - keys.first) * v.stride;
      const float* adds = call.started[at] || !covers ? kOnes.values : nullptr;
      const bool direct = task.last && covers && v.result.takes_products();
      Epilogue e{factor, adds, sums, v.stride, nullptr, sums, v.stride};
      if (direct) e.to = v.result.data, e.to_stride = v.result.stride, e.to_dtype = v.result.dtype;
      multiply_features(kPairs, a, kStride, 1, block.keys, columns, units<kPairs>(queries), features, e);
      if (direct) return;
    }
    if (task.last) gradient.finish(v, keys.count);
  };
  const float* kept = kPairs ? tile.p_pairs : call.p.dropout_p > 0.f ? tile.dropped : tile.scores;
  add(call.grad_value, kept, 1.f, grad, call.p.value_dim);
  add(call.grad_key, kPairs ? tile.ds_pairs : tile.ds, call.p.scale, query, call.p.head_dim);
  call.started[at] = 1;
  end_turn(call.turns + at, task.rank);
}

inline void load_stats(const BackwardCall& call, const QueryBlock& q, int64_t b, int64_t h, RowStats& stats) {
  const QuerySegment& s = *q.segment;
  const int64_t row = number_at(call.p, s, call.p.heads, b, h, q.first);
  const int64_t features = call.p.value_dim;
  stats.huge = false;
  for (int64_t i = 0; i < q.vectors * VW; ++i) {
    const bool empty = i >= q.count || s.row_max[row + i] == -kInfinity;
    stats.row_max[i] = empty ? 0.f : s.row_max[row + i];
    stats.shift[i] = exponent_shift(stats.row_max[i]);
    stats.huge |= !call.steps.scale_first && is_huge(stats.row_max[i]);
    stats.log2_sum[i] =
        empty ? kInfinity : (s.log_sum[row + i] - call.steps.hidden_by_shift(s.row_max[row + i])) * kLog2e;
    stats.grad_log_sum[i] = empty || s.grad_log_sum == nullptr ? 0.f : s.grad_log_sum[row + i];
    stats.delta[i] = -stats.grad_log_sum[i];
    if (empty) continue;
    vf total = zero();
    const void* grad = row_address(s.grad_out, call.p.dtype, b, h, q.first + i);
    with_element_type(call.p.dtype, row_address(s.out, call.p.dtype, b, h, q.first + i), [&](auto* out) {
      const auto* g = static_cast<decltype(out)>(const_cast<void*>(grad));
      for (int64_t c = 0; c < features; c += VW) {
        total = fma(load_as_float(out + c, features - c), load_as_float(g + c, features - c), total);
      }
    });
    stats.delta[i] += sum(total);
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

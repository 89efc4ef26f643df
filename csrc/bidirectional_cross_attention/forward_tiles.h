// The forward on tiles, with y, the shorter side, in the lanes: rows of x are read where they lie, and no probabilities
// are transposed. P, along the lanes, is multiplied by pairs of rows of y_value; R, in pairs of rows of x, makes
// y_outᵀ = x_valueᵀ · R, which tiles add up as [Dv][y] along a strip.
#pragma once

#include "csrc/attention/partial.h"
#include "csrc/bidirectional_cross_attention/forward_softmax.h"
#include "csrc/bidirectional_cross_attention/lane_panels.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kSidePairs = kSideBlock / 2;
constexpr int64_t kPairStride = spread_stride(kSidePairs);

// What a worker needs for one task.
struct TiledForwardTile {
  float *query, *x_value;            // x's rows where they do not lie as units; x_valueᵀ, [Dv][kPairStride]
  float *scores, *of_x, *of_y;       // [x][kSideBlock]; [x][kSidePairs]; [x / 2][kSideBlock]
  float* total;                      // x_out [x][Dv]
  float *hidden, *factor, *inverse;  // lanes that x does not attend to; per row or lane of a block
  Softmax x;

  static TiledForwardTile carve(const AttentionParams& p, Carver& memory) {
    const int64_t dv = round_up(p.value_dim, VW);
    TiledForwardTile t;
    t.query = memory.take(kSideBlock * spread_stride(units<true>(p.head_dim)));
    t.x_value = memory.take(dv * kPairStride);
    t.scores = memory.take(kSideBlock * kSideBlock);
    t.of_x = memory.take(kSideBlock * kSidePairs);
    t.of_y = memory.take(kSidePairs * kSideBlock);
    t.total = memory.take(dv * kSideBlock);
    t.hidden = memory.take(kSideBlock);
    t.factor = memory.take(kSideBlock);
    t.inverse = memory.take(kSideBlock);
    t.x = {memory.take(kSideBlock), memory.take(kSideBlock)};
    return t;
  }
};

// Running sums of all y of one head, a block of kSideBlock at a time: [Dv][kSideBlock].
struct LaneSums {
  float* totals;
  int64_t features;
  Softmax softmax;

  static int64_t floats(int64_t length, int64_t features) { return round_up(length, kSideBlock) * (features + 2); }
  static LaneSums at(float* memory, int64_t length, int64_t features) {
    const int64_t lanes = round_up(length, kSideBlock);
    float* const shift = memory + lanes * features;
    return {memory, features, {shift, shift + lanes}};
  }
  float* total(const KeyBlock& k) const { return totals + k.first * features; }
  Softmax softmax_of(const KeyBlock& k) const { return {softmax.shift + k.first, softmax.sum + k.first}; }
};

struct TiledForward {
  const BidirectionalParams& p;
  Exponents exponents;
  BidirectionalBlocks blocks;
  LanePanels keys;
  Panels values;
  int64_t stride, strips;

  explicit TiledForward(const BidirectionalParams& params)
      : p(params),
        exponents(params),
        blocks(params.attention),
        keys(params.attention, params.attention.keys[0].key, params.attention.keys[0].length,
             params.attention.head_dim),
        stride(round_up(params.attention.value_dim, VW)),
        strips(key_parts(params.attention.batch * params.attention.heads, blocks.query_blocks, 4)) {
    values.plan<true>(params.attention, true, false, true, false);
  }

  int64_t y_length() const { return p.attention.keys[0].length; }
  void block(const QueryBlock& q, Panel query, Panel x_value, const KeyHead& head, int64_t j, const TiledForwardTile& t,
             const LaneSums& y, bool starts_y, RowPrefetch& next) const;
  void task(const KeyHead& head, Range strip, const TiledForwardTile& t, const LaneSums& y) const;
  void finish_y(const KeyHead& head, const KeyBlock& k, const LaneSums& y) const;
  void merge_strips(const KeyBlock& k, const LaneSums* of_strips) const;
  void run();
};

// How many times a block's scores let something happen between their tiles.
inline int64_t score_steps(int64_t rows, int64_t lanes) {
  return ceil_div(lanes, 2 * VW) * ceil_div(rows, score_rows(2));
}

// Sums of lanes, each times what becomes of it.
inline void scale_lanes(float* total, int64_t features, int64_t vectors, const float* factor) {
  bool changes = false;
  for (int64_t i = 0; i < vectors * VW; ++i) changes |= factor[i] != 1.f;
  for (int64_t c = 0; changes && c < features; ++c, total += kSideBlock) {
    for (int64_t v = 0; v < vectors * VW; v += VW) store(total + v, load(total + v) * load(factor + v));
  }
}

// One block of x against one of y.
inline void TiledForward::block(const QueryBlock& q, Panel query, Panel x_value, const KeyHead& head, int64_t j,
                                const TiledForwardTile& t, const LaneSums& y, bool starts_y, RowPrefetch& next) const {
  const AttentionParams& a = p.attention;
  const KeyBlock k = blocks.key_block(j);
  const Softmax of_y = y.softmax_of(k);
  const uint8_t* visible = visible_queries(p, q, head.b);
  const int64_t vectors = ceil_div(k.count, VW), depth = units<true>(a.head_dim);
  const float* const lanes = keys.at(head.slot, k.first);
  const bool starts_x = j == 0, ends_x = j + 1 == blocks.key_blocks;
  const QuerySegment& x = a.queries[0];
  const Destination out{row_address(x.out, a.dtype, head.b, head.h, q.first), a.dtype, x.out.row, a.value_dim};
  for (int64_t lane = 0; lane < vectors * VW; lane += 2 * VW) {
    with_constant<2>(min(2, vectors - lane / VW), [&](auto some) {
      constexpr int NR = static_cast<int>(some);
      vf best[NR];
      MMK_UNROLL for (int v = 0; v < NR; ++v) best[v] = set1(-kInfinity);
      multiply_scores<true, false, NR, kSideBlock>(query, q.count, lanes + lane, depth, t.scores + lane, best, {},
                                                   [&] { next.step<false>(); });
      if (exponents.finishes || visible != nullptr) {
        finish_group<NR>(exponents, visible, q.count, t.scores + lane, best);
      }
      take_lanes<true, NR>(exponents, t.scores + lane, visible, q.count, best, {of_y.shift + lane, of_y.sum + lane},
                           t.factor + lane, t.of_y + lane);
    });
  }
  float* const total = y.total(k);
  if (!starts_y) scale_lanes(total, y.features, vectors, t.factor);
  multiply_turned_features(t.of_y, kSideBlock, vectors, x_value, units<true>(q.count), a.value_dim, !starts_y, total,
                           kSideBlock);

  with_bool(hidden_lanes(visible_keys(p, k, head.b), k.count, vectors, t.hidden), [&](auto hides) {
    take_rows<true, hides>(exponents, t.scores, t.hidden, q.count, vectors, t.x, t.factor, t.of_x);
  });
  const bool direct = ends_x && out.takes_products();
  if (ends_x) invert_sums(t.x.sum, q.count, t.inverse);
  Epilogue e{1.f, starts_x ? nullptr : t.factor, t.total, stride, nullptr, t.total, stride};
  if (direct) e.finish = t.inverse, e.to = out.data, e.to_stride = out.stride, e.to_dtype = out.dtype;
  multiply_features(true, t.of_x, kSidePairs, 1, q.count, values.columns(head.slot, head.b, head.h, 0, k.first),
                    units<true>(k.count), a.value_dim, e);
  if (ends_x && !direct) store_rows(out, t.total, stride, q.count, t.inverse);
}

// y_out of a block of y, its sums complete.
inline void TiledForward::finish_y(const KeyHead& head, const KeyBlock& k, const LaneSums& y) const {
  const AttentionParams& a = p.attention;
  alignas(64) float inverse[kSideBlock];
  const Softmax softmax = y.softmax_of(k);
  invert_sums(softmax.sum, round_up(k.count, VW), inverse);
  store_lanes(y.total(k), kSideBlock, k.count, a.value_dim, inverse,
              row_address(p.y_out, a.dtype, head.b, head.h, k.first), p.y_out.row);
  softmax.store_stats(p.y, (head.b * a.heads + head.h) * y_length() + k.first, k.count);
}

inline void TiledForward::task(const KeyHead& head, Range strip, const TiledForwardTile& t, const LaneSums& y) const {
  const AttentionParams& a = p.attention;
  const QuerySegment& x = a.queries[0];
  const int64_t depth = units<true>(a.head_dim);
  y.softmax.clear(round_up(y_length(), kSideBlock));
  for (int64_t i = strip.begin; i < strip.end; ++i) {
    const QueryBlock q = blocks.query_block(i);
    const Operand query = operand_of_rows<true>(a.dtype, row_address(x.query, a.dtype, head.b, head.h, q.first),
                                                x.query.row, q.count, a.head_dim, t.query, spread_stride(depth));
    const auto* value = static_cast<const uint16_t*>(row_address(p.x_value, a.dtype, head.b, head.h, q.first));
    pack_columns_as_turned_pairs(value, p.x_value.row, q.count, a.value_dim, t.x_value, kPairStride);
    t.x.clear(kSideBlock);
    const int64_t steps = score_steps(q.count, min(kSideBlock, y_length())) * blocks.key_blocks;
    RowPrefetch next = next_rows(a, x.query, a.head_dim, q, head.b, head.h, steps);  // more of them costs more
    for (int64_t j = 0; j < blocks.key_blocks; ++j) {
      block(q, {query.data, query.stride}, {t.x_value, kPairStride, true}, head, j, t, y, i == strip.begin, next);
    }
    t.x.store_stats(p.x, (head.b * a.heads + head.h) * x.length + q.first, q.count);
  }
  if (strips > 1) return;
  for (int64_t j = 0; j < blocks.key_blocks; ++j) finish_y(head, blocks.key_block(j), y);
}

// The strips' sums of a block of y, in their order, into the first.
inline void TiledForward::merge_strips(const KeyBlock& k, const LaneSums* of_strips) const {
  const Softmax first = of_strips[0].softmax_of(k);
  const int64_t vectors = ceil_div(k.count, VW);
  for (int64_t c = 1; c < strips; ++c) {
    const Softmax other = of_strips[c].softmax_of(k);
    alignas(64) float kept[kSideBlock], added[kSideBlock];
    for (int64_t i = 0; i < vectors * VW; ++i) {
      const float shift = other.shift[i] <= first.shift[i] ? first.shift[i] : other.shift[i];
      kept[i] = std::exp2(first.shift[i] - shift);
      added[i] = std::exp2(other.shift[i] - shift);
      first.sum[i] = kept[i] * first.sum[i] + added[i] * other.sum[i];
      first.shift[i] = shift;
    }
    float* to = of_strips[0].total(k);
    const float* from = of_strips[c].total(k);
    for (int64_t f = 0; f < stride; ++f, to += kSideBlock, from += kSideBlock) {
      for (int64_t i = 0; i < vectors * VW; i += VW) {
        store(to + i, fma(load(added + i), load(from + i), load(kept + i) * load(to + i)));
      }
    }
  }
}

inline void TiledForward::run() {
  const AttentionParams& a = p.attention;
  const int64_t packed = keys.floats_per_head() + values.floats_per_head();
  const int64_t heads_of_all = a.batch * a.heads, wave = heads_per_wave(a, packed);
  const int64_t sums = round_up(LaneSums::floats(y_length(), stride), 16);
  const int64_t slots = strips > 1 ? wave * strips : a.workers.count;

  Carver count(nullptr);
  TiledForwardTile::carve(a, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const Scratch scratch(a.workers.count * tile_size + wave * packed + slots * sums);
  float* const panels = scratch.data() + a.workers.count * tile_size;
  float* const sums_memory = panels + wave * packed;
  keys.use(panels);
  values.use(panels + wave * keys.floats_per_head());
  const auto sums_at = [&](int64_t slot) { return LaneSums::at(sums_memory + slot * sums, y_length(), stride); };

  for (int64_t begin = 0; begin < heads_of_all; begin += wave) {
    const int64_t heads = min(wave, heads_of_all - begin);
    const auto head_of = [&](int64_t i) { return KeyHead{i, (begin + i) / a.heads, (begin + i) % a.heads}; };
    pack_wave<BidirectionalBlocks>(a, begin, heads, keys, values);
    for_each_claim(a.workers, heads * strips, 1, [&](int worker, int64_t first, int64_t last) {
      Carver memory(scratch.data() + worker * tile_size);
      const TiledForwardTile tile = TiledForwardTile::carve(a, memory);
      for (int64_t i = first; i < last; ++i) {
        const int64_t strip = i % strips;
        task(head_of(i / strips), {blocks.query_blocks * strip / strips, blocks.query_blocks * (strip + 1) / strips},
             tile, sums_at(strips > 1 ? i : worker));
      }
    });
    if (strips == 1) continue;
    for_each_claim(a.workers, heads * blocks.key_blocks, 1, [&](int, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = i / blocks.key_blocks;
        const KeyBlock k = blocks.key_block(i % blocks.key_blocks);
        LaneSums of_strips[kMaxParts];
        for (int64_t c = 0; c < strips; ++c) of_strips[c] = sums_at(head * strips + c);
        merge_strips(k, of_strips);
        finish_y(head_of(head), k, of_strips[0]);
      }
    });
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// The backward on tiles. S and both gradients of probabilities are made with y in the lanes, so that the rows of x are
// multiplied where they lie; the rows of y are put into lanes once for a head.
//
// A strip of the three products, a few rows of x, is made into P, R and dS at once, which are stored as bfloat16 alone.
// What dx_query and dx_value are made of has pairs of y in its rows, what dy_key and dy_value are made of pairs of x:
// pairs of a strip's rows, transposed.
#pragma once

#include "csrc/bidirectional_cross_attention/backward_call.h"
#include "csrc/bidirectional_cross_attention/lane_panels.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kStripRows = 2 * kTileRows, kMostStripRows = 3 * kTileRows;  // the last has no tile of a few rows

// What a worker needs for one task.
struct TilesTile {
  float *query_rows, *value_rows, *grad_rows;  // X, x_value and dx_out where they do not lie in units
  float *query_columns, *grad_columns;         // pairs of rows of X and of dx_out
  float *scores, *dp, *dr;                     // a strip: [rows][kSideBlock]
  float *p_strip, *ds_strip;                   // pairs of its rows
  float* rounded;                              // two rows of exponents
  float *p_pairs, *ds_pairs;                   // [y][kSideBlock / 2], pairs of x
  float *r_rows, *ds_rows;                     // [x][kSideBlock / 2], pairs of y
  float *dquery, *dvalue;                      // [x][features]
  float *hidden_x, *hidden_y;                  // 0 or -inf
  RowStats x, y;

  static int64_t column_stride(int64_t features) { return spread_stride(features); }
  static TilesTile carve(const AttentionParams& p, Carver& memory) {
    constexpr int64_t strip = kMostStripRows * kSideBlock, pairs = kSideBlock * kSideBlock / 2;
    const int64_t d = units<true>(p.head_dim) * kSideBlock, dv = units<true>(p.value_dim) * kSideBlock;
    TilesTile t;
    t.query_rows = memory.take(d);
    t.value_rows = memory.take(dv);
    t.grad_rows = memory.take(dv);
    t.query_columns = memory.take(column_stride(p.head_dim) * kSideBlock / 2);
    t.grad_columns = memory.take(column_stride(p.value_dim) * kSideBlock / 2);
    t.scores = memory.take(strip);
    t.dp = memory.take(strip);
    t.dr = memory.take(strip);
    t.p_strip = memory.take(strip);
    t.ds_strip = memory.take(strip);
    t.rounded = memory.take(2 * kSideBlock);
    t.p_pairs = memory.take(pairs);
    t.ds_pairs = memory.take(pairs);
    t.r_rows = memory.take(pairs);
    t.ds_rows = memory.take(pairs);
    t.dquery = memory.take(round_up(p.head_dim, VW) * kSideBlock);
    t.dvalue = memory.take(round_up(p.value_dim, VW) * kSideBlock);
    t.hidden_x = memory.take(kSideBlock);
    t.hidden_y = memory.take(kSideBlock);
    t.x = RowStats::carve(memory);
    t.y = RowStats::carve(memory);
    return t;
  }
};

// Statistics of a block of y, and the lanes that x attends to as 0 or -inf. Whether any is hidden.
inline bool load_y_stats(const BackwardCall& call, const KeyHead& head, const KeyBlock& k, const TilesTile& t) {
  const AttentionParams& p = call.p.attention;
  const int64_t row = (head.b * p.heads + head.h) * k.segment->length + k.first;
  const uint8_t* visible = visible_keys(call.p, k, head.b);
  bool any = false;
  for (int64_t i = 0; i < round_up(k.count, VW); ++i) {
    const bool real = i < k.count, hides = !real || (visible != nullptr && visible[i] == 0);
    t.y.shift[i] = real ? call.p.y.shift[row + i] : 0.f;
    t.y.log2_sum[i] = real ? call.p.y.log2_sum[row + i] : kInfinity;
    t.y.delta[i] = real ? call.delta_y[row + i] : 0.f;
    t.hidden_y[i] = hides ? -kInfinity : 0.f;
    any |= hides;
  }
  return any;
}

// A strip's P, R and dS, from row `first` of the block on. kHidden: some row or lane is; kSteps: a product is more than
// scaled, or shifts are huge; kDs: dS is wanted.
template <bool kHidden, bool kSteps, bool kDs, class Between>
MMK_NOINLINE void finish_strip(const BackwardCall& call, const TilesTile& t, int64_t first, int64_t rows,
                               int64_t vectors, bool huge, Between between) {
  if constexpr (kBf16Dot) {
    const Exponents& e = call.exponents;
    const vf scale = set1(e.scale);
    for (int64_t i = 0; i < rows; i += 2) {
      between();
      vf shift_x[2], log2_sum_x[2], delta_x[2], hidden_x[2];
      MMK_UNROLL for (int n = 0; n < 2; ++n) {
        const int64_t row = first + i + n;
        shift_x[n] = set1(t.x.shift[row]);
        log2_sum_x[n] = set1(t.x.log2_sum[row]);
        delta_x[n] = set1(t.x.delta[row]);
        hidden_x[n] = set1(t.hidden_x[row]);
        if (kSteps && huge)
          round_exponents(t.scores + (i + n) * kSideBlock, e.scale, vectors, t.rounded + n * kSideBlock);
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = v * VW;
        const vf shift_y = load(t.y.shift + lane), log2_sum_y = load(t.y.log2_sum + lane);
        vf p[2], ds[2];
        MMK_UNROLL for (int n = 0; n < 2; ++n) {
          const int64_t at = (i + n) * kSideBlock + lane, row = (first + i + n) * (kSideBlock / 2);
          const vf product = load(t.scores + at), s = kSteps && e.finishes ? e.finished(product) : product;
          vf of_x = fma(s, scale, -shift_x[n]), of_y = fma(s, scale, -shift_y);
          if (kSteps && huge) {
            const vf rounded = load(t.rounded + n * kSideBlock + lane);
            of_x = select(is_huge(shift_x[n]), rounded - shift_x[n], of_x);
            of_y = select(is_huge(shift_y), rounded - shift_y, of_y);
          }
          p[n] = exp2_beside_tiles(of_x - log2_sum_x[n]);
          vf r = exp2_beside_tiles(of_y - log2_sum_y);
          if constexpr (kHidden) {
            p[n] = select(load(t.hidden_y + lane) == zero(), p[n], zero());
            r = select(hidden_x[n] == zero(), r, zero());
          }
          store_bf16(reinterpret_cast<uint16_t*>(t.r_rows + row) + lane, r);
          if constexpr (kDs) {
            // a probability of 0 stays a gradient of 0 even where that of the probability is not finite
            const vf of_p = p[n] * (load(t.dp + at) - delta_x[n]),
                     of_r = r * (load(t.dr + at) - load(t.y.delta + lane));
            ds[n] = select(p[n] == zero(), zero(), of_p) + select(r == zero(), zero(), of_r);
            if (kSteps && e.clamps) ds[n] = select(e.passes(product), ds[n], zero());
            store_bf16(reinterpret_cast<uint16_t*>(t.ds_rows + row) + lane, ds[n]);
          }
        }
        store(t.p_strip + i / 2 * kSideBlock + lane, pair(p[0], p[1]));
        if constexpr (kDs) store(t.ds_strip + i / 2 * kSideBlock + lane, pair(ds[0], ds[1]));
      }
    }
  }
}

// Pairs of a strip's rows → rows of y, [y][kSideBlock / 2]. What they hold beyond the last row is never read.
inline void turn_strip(const float* strip, int64_t first, int64_t rows, int64_t vectors, float* to) {
  for (int64_t i = 0; i < rows / 2; i += VW) {
    for (int64_t v = 0; v < vectors; ++v) {
      vf r[VW];
      load_transposed(strip + i * kSideBlock + v * VW, kSideBlock, r);
      MMK_UNROLL for (int x = 0; x < VW; ++x) store(to + (v * VW + x) * (kSideBlock / 2) + first / 2 + i, r[x]);
    }
  }
}

// The rows of x of a task as the operands of products, in place or copied.
struct RowsOfX {
  Operand query, value, grad;
};

// P, R and dS of a block.
template <class Between>
void make_block(const BackwardCall& call, const QueryBlock& q, const KeyBlock& k, const RowsOfX& rows,
                const float* const (&lanes)[3], bool hidden, const TilesTile& t, Between between) {
  const AttentionParams& p = call.p.attention;
  const int64_t vectors = ceil_div(k.count, VW), d = units<true>(p.head_dim), dv = units<true>(p.value_dim);
  const bool wants_ds = call.wants_ds();
  const bool huge = !call.exponents.finishes && (any_is_huge(t.x.shift, q.count) || any_is_huge(t.y.shift, k.count));
  const auto multiply = [&](const Operand& a, int64_t first, int64_t count, const float* b, int64_t depth, float* to) {
    multiply_tiles({a.data + first * a.stride, a.stride, count, b, kSideBlock, depth, vectors}, to, kSideBlock);
    // an odd last row is paired with nothing: that row of x is hidden
    if (count % 2 != 0) std::memset(to + count * kSideBlock, 0, sizeof(float) * kSideBlock);
  };
  for (int64_t first = 0, count; first < q.count; first += count) {
    count = q.count - first < kMostStripRows ? q.count - first : kStripRows;
    const int64_t even = round_up(count, 2);
    multiply(rows.query, first, count, lanes[0], d, t.scores);
    if (wants_ds) {
      multiply(rows.grad, first, count, lanes[1], dv, t.dp);
      multiply(rows.value, first, count, lanes[2], dv, t.dr);
    }
    with_bool(hidden, [&](auto hides) {
      with_bool(huge || call.exponents.finishes, [&](auto steps) {
        with_bool(wants_ds,
                  [&](auto ds) { finish_strip<hides, steps, ds>(call, t, first, even, vectors, huge, between); });
      });
    });
    if (call.grad_value.wanted(0)) turn_strip(t.p_strip, first, even, vectors, t.p_pairs);
    if (call.grad_key.wanted(0)) turn_strip(t.ds_strip, first, even, vectors, t.ds_pairs);
  }
}

inline void backward_on_tiles(const BidirectionalParams& params) {
  const AttentionParams& p = params.attention;
  const KeySegment& y = p.keys[0];
  const QuerySegment& x = p.queries[0];
  BackwardCall call(params);
  call.keys.plan<true>(p, false, false, call.want_query, false);
  call.y_grads.plan<true>(call.grads, true, false, call.want_x_value, false);
  LanePanels key_lanes(p, y.key, y.length, p.head_dim), value_lanes(p, y.value, y.length, p.value_dim);
  LanePanels grad_lanes(p, params.grad_y_out, y.length, p.value_dim);
  const auto run_task = [&](const KeyHead& head, int64_t block, const TilesTile& t) {
    const QueryBlock q = call.blocks.query_block(block);
    const auto operand = [&](const Rows& rows, int64_t features, float* copy) {
      const void* data = row_address(rows, p.dtype, head.b, head.h, q.first);
      return operand_of_rows<true>(p.dtype, data, rows.row, q.count, features, copy, units<true>(features));
    };
    const auto columns = [&](const Rows& rows, int64_t features, float* to) {
      const int64_t stride = TilesTile::column_stride(features);
      const auto* data = static_cast<const uint16_t*>(row_address(rows, p.dtype, head.b, head.h, q.first));
      pack_columns_as_pairs(data, rows.row, q.count, features, to, stride);
      return Panel{to, stride};
    };
    const RowsOfX rows{operand(x.query, p.head_dim, t.query_rows), operand(params.x_value, p.value_dim, t.value_rows),
                       operand(x.grad_out, p.value_dim, t.grad_rows)};
    Panel x_query{}, x_grad{};
    if (call.grad_key.wanted(0)) x_query = columns(x.query, p.head_dim, t.query_columns);
    if (call.grad_value.wanted(0)) x_grad = columns(x.grad_out, p.value_dim, t.grad_columns);
    const bool hides_rows = hidden_lanes(visible_queries(params, q, head.b), q.count, q.vectors, t.hidden_x);
    load_x_stats(call, q, head, t.x);
    TaskPrefetch prefetch(call, q, head, ceil_div(q.count, 2) * call.blocks.key_blocks);
    for (int64_t j = 0; j < call.blocks.key_blocks; ++j) {
      const KeyBlock k = call.blocks.key_block(j);
      const bool hidden = load_y_stats(call, head, k, t) || hides_rows;
      const float* const lanes[3] = {key_lanes.at(head.slot, k.first), value_lanes.at(head.slot, k.first),
                                     grad_lanes.at(head.slot, k.first)};
      make_block(call, q, k, rows, lanes, hidden, t, [&] { prefetch.step(); });
      constexpr int64_t kStride = kSideBlock / 2;
      add_x_gradients<true>(call, head, q, j, {t.ds_rows, kStride, 1}, {t.r_rows, kStride, 1}, t.dquery, t.dvalue);
      add_y_gradients<true>(call, head, j, static_cast<int32_t>(block), q.count, t.p_pairs, t.ds_pairs, kStride,
                            x_query, x_grad);
    }
  };
  run_backward<TilesTile>(call, run_task, call.keys, call.y_grads, key_lanes, value_lanes, grad_lanes);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

//
//   P = softmax of x's rows, R = softmax of y's:   P = exp(S - lse_x),  R = exp(S - lse_y)
//   dS = P ∘ (dx_out y_valueᵀ - δ_x) + R ∘ (x_value dy_outᵀ - δ_y),  δ = Σ_d out ∘ dout;  0 where the clamp held S
//   dx_query = scale · dS y_key,  dy_key = scale · dSᵀ x_query,  dy_value = Pᵀ dx_out,  dx_value = R dy_out
//
// Tiling     a task owns kSideBlock rows of one head's x and walks y in blocks of as many, once: seven products a
//            block. S and both gradients of probabilities have x in the lanes, or y where there are tiles
//            (backward_tiles.h). dx_query and dx_value of the task stay in cache, dy_key and dy_value of the block are
//            read and written once per task.
// Threads    the tasks of a head add to the same dy_key and dy_value, each block of y in the order of the tasks: no bit
//            depends on the number of threads.
// Precision  P and R are recomputed by the very operations of the forward, from maxima and sums apart. A product starts
//            its accumulators at zero and is added to the running sum at its end, in float32; those of dy_key and
//            dy_value on tiles go on from the sum.
// Limits     as the forward. On tiles: backward_tiles.h.
#include "csrc/bidirectional_cross_attention/backward_tiles.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// What a worker needs for one task. The layouts named pairs exist for products on bfloat16 pairs only.
template <bool kPairs>
struct BackwardTile {
  float *query_lanes, *value_lanes, *grad_lanes;  // Xᵀ, x_valueᵀ and dx_outᵀ
  float *query_columns, *grad_columns;            // X and dx_out
  float *scores, *p, *r, *ds;                     // [y][kSideBlock]
  float *p_pairs, *ds_pairs;                      // [y][kSideBlock / 2], pairs of x
  float *r_y_pairs, *ds_y_pairs;                  // [y / 2][kSideBlock], pairs of y
  float *dquery, *dvalue;                         // [x][features]
  float* hidden;                                  // per row of x
  RowStats x;

  static BackwardTile carve(const AttentionParams& p, Carver& memory) {
    constexpr int64_t block = (kSideBlock + 1) * kSideBlock, pairs = kPairs ? block / 2 : 0;
    const int64_t d = round_up(p.head_dim, VW) * kSideBlock, dv = round_up(p.value_dim, VW) * kSideBlock;
    BackwardTile t;
    t.query_lanes = memory.take(d);
    t.value_lanes = memory.take(dv);
    t.grad_lanes = memory.take(dv);
    t.query_columns = memory.take(d);
    t.grad_columns = memory.take(dv);
    t.scores = memory.take(block);
    t.p = memory.take(block);
    t.r = memory.take(block);
    t.ds = memory.take(block);
    t.p_pairs = memory.take(pairs);
    t.ds_pairs = memory.take(pairs);
    t.r_y_pairs = memory.take(pairs + kSideBlock);
    t.ds_y_pairs = memory.take(pairs + kSideBlock);
    t.dquery = memory.take(d);
    t.dvalue = memory.take(dv);
    t.hidden = memory.take(kSideBlock);
    t.x = RowStats::carve(memory);
    return t;
  }
};

// Both probabilities of a group of lanes.
template <bool kPairs, int NR>
MMK_NOINLINE void make_probabilities(const BackwardCall& call, const BackwardTile<kPairs>& t, int64_t lane,
                                     int64_t keys, const uint8_t* visible, const float* y_shift,
                                     const float* y_log2_sum) {
  constexpr int kDegree = kPairs ? 3 : 5;
  const Exponents& e = call.exponents;
  const vf scale = set1(e.scale);
  vf shift[NR], log2_sum[NR], hidden[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    shift[j] = load(t.x.shift + lane + j * VW);
    log2_sum[j] = load(t.x.log2_sum + lane + j * VW);
    hidden[j] = load(t.hidden + lane + j * VW);
  }
  const bool huge = !e.finishes && (any_is_huge(t.x.shift + lane, NR * VW) || any_is_huge(y_shift, keys));
  if (huge) {
    for (int64_t i = 0; i < keys; ++i)
      round_exponents(t.scores + i * kSideBlock + lane, e.scale, NR, t.p + i * kSideBlock + lane);
  }
  for (int64_t i = 0; i < keys; ++i) {
    const bool hides = visible != nullptr && visible[i] == 0;
    const vf shift_y = set1(y_shift[i]), log2_sum_y = set1(y_log2_sum[i]);
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const int64_t at = i * kSideBlock + lane + j * VW;
      const vf product = load(t.scores + at), s = e.finishes ? e.finished(product) : product;
      vf of_x = fma(s, scale, -shift[j]), of_y = fma(s, scale, -shift_y);
      if (huge) {
        const vf rounded = load(t.p + at);
        of_x = select(is_huge(shift[j]), rounded - shift[j], of_x);
        of_y = select(is_huge(shift_y), rounded - shift_y, of_y);
      }
      const vf p = hides ? zero() : exp2<kDegree>(of_x - log2_sum[j]);
      const vf r = select(hidden[j] == zero(), exp2<kDegree>(of_y - log2_sum_y), zero());
      store(t.p + at, p);
      store(t.r + at, r);
      if constexpr (kPairs) {
        store_bf16(reinterpret_cast<uint16_t*>(t.p_pairs + i * (kSideBlock / 2)) + lane + j * VW, p);
      }
    }
  }
}

// ds (+)= probability ∘ (product - δ) of a vector.
template <bool kAdd>
MMK_INLINE void put_ds(vf product, const float* probability, vf delta, float* ds) {
  const vf p = load(probability);
  // a probability of 0 stays a gradient of 0 even where that of the probability is not finite
  const vf x = select(p == zero(), zero(), p * (product - delta));
  store(ds, kAdd ? load(ds) + x : x);
}

// ds (+)= probability ∘ (rows · lanes - δ), δ of the lanes or of the rows.
template <bool kPairs, bool kOfRows, int MR, int NR>
MMK_NOINLINE void ds_tile(Panel rows, const float* lanes, int64_t depth, const float* probability, const float* delta,
                          float* ds) {
  vf acc[MR][NR];
  clear(acc);
  accumulate<kPairs>(acc, rows.data, rows.stride, Constant<1>{}, lanes, Constant<kSideBlock>{}, depth);
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    MMK_UNROLL for (int r = 0; r < MR; ++r) {
      const int64_t at = r * kSideBlock + j * VW;
      put_ds<kOfRows>(acc[r][j], probability + at, kOfRows ? set1(delta[r]) : load(delta + j * VW), ds + at);
    }
  }
}

// dS of a group of lanes, complete up to the scale; pairs of it and of R.
template <bool kPairs, int NR>
void make_ds(const BackwardCall& call, const BackwardTile<kPairs>& t, int64_t lane, int64_t keys, Panel y_value,
             Panel y_grad, const float* delta_y) {
  const int64_t depth = units<kPairs>(call.p.attention.value_dim);
  const auto rows_from = [](Panel panel, int64_t i) { return Panel{panel.data + i * panel.stride, panel.stride}; };
  for_runs<score_rows(NR)>(keys, [&](auto rows, int64_t i) {
    constexpr int MR = static_cast<int>(rows);
    const int64_t at = i * kSideBlock + lane;
    ds_tile<kPairs, false, MR, NR>(rows_from(y_value, i), t.grad_lanes + lane, depth, t.p + at, t.x.delta + lane,
                                   t.ds + at);
    ds_tile<kPairs, true, MR, NR>(rows_from(y_grad, i), t.value_lanes + lane, depth, t.r + at, delta_y + i, t.ds + at);
  });
  if (!call.exponents.clamps) return;
  for (int64_t i = 0; i < keys; ++i) {
    MMK_UNROLL for (int v = 0; v < NR; ++v) {
      const int64_t at = i * kSideBlock + lane + v * VW;
      store(t.ds + at, select(call.exponents.passes(load(t.scores + at)), load(t.ds + at), zero()));
    }
  }
}

// [rows][kSideBlock] → pairs of rows, and if set pairs along the lanes.
inline void make_pairs(const float* from, int64_t rows, int64_t vectors, float* of_rows, float* of_lanes) {
  if constexpr (kBf16Dot) {
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t x = 0; x < vectors * VW; x += VW) {
        const vf even = load(from + i * kSideBlock + x);
        const vf odd = i + 1 < rows ? load(from + (i + 1) * kSideBlock + x) : zero();
        store(of_rows + i / 2 * kSideBlock + x, pair(even, odd));
        if (of_lanes == nullptr) continue;
        auto* halves = reinterpret_cast<uint16_t*>(of_lanes + i * (kSideBlock / 2)) + x;
        store_bf16(halves, even);
        store_bf16(halves + kSideBlock, odd);
      }
    }
  }
}

template <bool kPairs>
void backward_task(const BackwardCall& call, const KeyHead& head, int64_t block, const BackwardTile<kPairs>& t) {
  const AttentionParams& p = call.p.attention;
  const QuerySegment& x = p.queries[0];
  const int64_t b = head.b, h = head.h;
  const QueryBlock q = call.blocks.query_block(block);
  const auto as_lanes = [&](const Rows& rows, int64_t features, float* to) {
    pack_lanes(kPairs, p.dtype, row_address(rows, p.dtype, b, h, q.first), rows.row, q.count, features, to, kSideBlock);
  };
  as_lanes(x.query, p.head_dim, t.query_lanes);
  as_lanes(x.grad_out, p.value_dim, t.grad_lanes);
  as_lanes(call.p.x_value, p.value_dim, t.value_lanes);
  const Panel x_query = pack_columns<kPairs>(p.dtype, x.query, b, h, q, p.head_dim, t.query_columns);
  const Panel x_grad = pack_columns<kPairs>(p.dtype, x.grad_out, b, h, q, p.value_dim, t.grad_columns);
  hidden_lanes(visible_queries(call.p, q, b), q.count, q.vectors, t.hidden);
  load_x_stats(call, q, head, t.x);

  const int64_t tiles = score_tiles(q.vectors, min(kSideBlock, p.keys[0].length)) * call.blocks.key_blocks;
  TaskPrefetch prefetch(call, q, head, tiles);
  for (int64_t j = 0; j < call.blocks.key_blocks; ++j) {
    const KeyBlock k = call.blocks.key_block(j);
    const int64_t y = (b * p.heads + h) * p.keys[0].length + k.first;
    const uint8_t* visible = visible_keys(call.p, k, b);
    const Panel y_value = call.values.rows(head.slot, b, h, 0, k.first);
    const Panel y_grad = call.y_grads.rows(head.slot, b, h, 0, k.first);
    for_score_groups<kPairs>(
        p, q, t.query_lanes, call.keys.rows(head.slot, b, h, 0, k.first), k.count, t.scores, [&] { prefetch.step(); },
        [&](auto vectors, int64_t lane, auto&) {
          constexpr int NR = static_cast<int>(vectors);
          make_probabilities<kPairs, NR>(call, t, lane, k.count, visible, call.p.y.shift + y, call.p.y.log2_sum + y);
          if (call.wants_ds()) {
            make_ds<kPairs, NR>(call, t, lane, k.count, y_value, y_grad, call.delta_y + y);
          }
        });
    if constexpr (kPairs) {
      if (call.wants_ds()) make_pairs(t.ds, k.count, q.vectors, t.ds_y_pairs, t.ds_pairs);
      if (call.want_x_value) make_pairs(t.r, k.count, q.vectors, t.r_y_pairs, nullptr);
    }
    add_x_gradients<kPairs>(call, head, q, j, {kPairs ? t.ds_y_pairs : t.ds, 1, kSideBlock},
                            {kPairs ? t.r_y_pairs : t.r, 1, kSideBlock}, t.dquery, t.dvalue);
    add_y_gradients<kPairs>(call, head, j, static_cast<int32_t>(block), q.count, kPairs ? t.p_pairs : t.p,
                            kPairs ? t.ds_pairs : t.ds, kPairs ? kSideBlock / 2 : kSideBlock, x_query, x_grad);
  }
}

template <bool kPairs>
void backward(const BidirectionalParams& params) {
  const AttentionParams& p = params.attention;
  if (kPairs && p.workers.tiles != TileUnit::none) return backward_on_tiles(params);
  BackwardCall call(params);
  call.keys.plan<kPairs>(p, false, true, call.want_query);
  call.values.plan<kPairs>(p, true, true, false);
  call.y_grads.plan<kPairs>(call.grads, true, true, call.want_x_value);
  run_backward<BackwardTile<kPairs>>(
      call,
      [&](const KeyHead& head, int64_t block, const BackwardTile<kPairs>& t) { backward_task(call, head, block, t); },
      call.keys, call.values, call.y_grads);
}

}  // namespace

void bidirectional_backward(const BidirectionalParams& p) {
  with_pairs(p.attention.dtype, p.attention.workers.tiles, is_worth_tiles(p.attention),
             [&](auto pairs) { backward<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk

//
//   P = softmax of x's rows, R = softmax of y's:   P = exp(S - lse_x),  R = exp(S - lse_y)
//   dS = P ∘ (dx_out y_valueᵀ - δ_x) + R ∘ (x_value dy_outᵀ - δ_y),  δ = Σ_d out ∘ dout;  0 where the clamp held S
//   dx_query = scale · dS y_key,  dy_key = scale · dSᵀ x_query,  dy_value = Pᵀ dx_out,  dx_value = R dy_out
//
// Tiling     a task owns kSideBlock rows of one head's x and walks y in blocks of as many, once: seven products a
// block.
//            S and both gradients of probabilities have x in the lanes. dx_query and dx_value of the task stay in
//            cache, dy_key and dy_value of the block are read and written once per task.
// Threads    the tasks of a head add to the same dy_key and dy_value, each block of y in the order of the tasks: no bit
//            depends on the number of threads.
// Precision  P and R are recomputed by the very operations of the forward, from maxima and sums apart. A product starts
//            its accumulators at zero and is added to the running sum at its end, in float32.
// Limits     as the forward.
#include "csrc/attention/key_gradient.h"
#include "csrc/bidirectional_cross_attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// What a worker needs for one task. The layouts named pairs exist for products on bfloat16 pairs only.
struct BackwardTile {
  float *query_lanes, *value_lanes, *grad_lanes;  // Xᵀ, x_valueᵀ and dx_outᵀ
  float *query_columns, *grad_columns;            // X and dx_out
  float *scores, *p, *r, *ds;                     // [y][kSideBlock]
  float *p_pairs, *ds_pairs;                      // [y][kSideBlock / 2], pairs of x
  float *r_y_pairs, *ds_y_pairs;                  // [y / 2][kSideBlock], pairs of y
  float *dquery, *dvalue;                         // [x][features]
  float *hidden, *shift, *log2_sum, *delta;       // per row of x

  template <bool kPairs>
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
    t.shift = memory.take(kSideBlock);
    t.log2_sum = memory.take(kSideBlock);
    t.delta = memory.take(kSideBlock);
    return t;
  }
};

struct BackwardCall {
  const BidirectionalParams& p;
  AttentionParams grads;  // dy_out in the place of y_value
  Exponents exponents;
  BidirectionalBlocks blocks;
  Panels keys, values, y_grads;
  KeyGradient grad_key, grad_value;
  bool want_query, want_x_value;
  const float* delta_y = nullptr;  // [B, H, Ly]
  int32_t* turns = nullptr;        // [heads of the wave][blocks of y]

  explicit BackwardCall(const BidirectionalParams& params)
      : p(params),
        grads(params.attention),
        exponents(params),
        blocks(params.attention),
        want_query(params.attention.queries[0].grad_query.data != nullptr),
        want_x_value(params.grad_x_value.data != nullptr) {
    grads.keys[0].value = params.grad_y_out;
  }
  bool wants_ds() const { return want_query || grad_key.wanted(0); }
};

// δ of a row.
inline float row_delta(Dtype dtype, const void* out, const void* grad, int64_t features) {
  vf total = zero();
  with_element_type(dtype, out, [&](const auto* o) {
    const auto* g = static_cast<decltype(o)>(grad);
    for (int64_t c = 0; c < features; c += VW) {
      total = fma(load_as_float(o + c, features - c), load_as_float(g + c, features - c), total);
    }
  });
  return sum(total);
}

// Both probabilities of a group of lanes.
template <bool kPairs, int NR>
MMK_NOINLINE void make_probabilities(const BackwardCall& call, const BackwardTile& t, int64_t lane, int64_t keys,
                                     const uint8_t* visible, const float* y_shift, const float* y_log2_sum) {
  constexpr int kDegree = kPairs ? 3 : 5;
  const Exponents& e = call.exponents;
  const vf scale = set1(e.scale);
  vf shift[NR], log2_sum[NR], hidden[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) {
    shift[j] = load(t.shift + lane + j * VW);
    log2_sum[j] = load(t.log2_sum + lane + j * VW);
    hidden[j] = load(t.hidden + lane + j * VW);
  }
  const bool huge = !e.finishes && (any_is_huge(t.shift + lane, NR * VW) || any_is_huge(y_shift, keys));
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

// The same of all rows of a group of `vectors` lanes, on tiles.
template <bool kOfRows>
MMK_NOINLINE void ds_on_tiles(Panel rows, int64_t count, int64_t vectors, const float* lanes, int64_t depth,
                              const float* probability, const float* delta, float* ds) {
  const TileOperands product{rows.data, rows.stride, count, lanes, kSideBlock, depth, vectors};
  for_tiles(product, [&](const float* tile, int64_t row, int64_t n, int64_t v, int64_t some) {
    for (int64_t i = row; i < row + n; ++i, tile += kTileStride) {
      for (int64_t j = v; j < v + some; ++j) {
        const int64_t at = i * kSideBlock + j * VW;
        const vf d = kOfRows ? set1(delta[i]) : load(delta + j * VW);
        put_ds<kOfRows>(load(tile + (j - v) * VW), probability + at, d, ds + at);
      }
    }
  });
}

// dS of a group of lanes, complete up to the scale; pairs of it and of R.
template <bool kPairs, int NR>
void make_ds(const BackwardCall& call, const BackwardTile& t, int64_t lane, int64_t keys, Panel y_value, Panel y_grad,
             const float* delta_y) {
  const int64_t depth = units<kPairs>(call.p.attention.value_dim);
  const auto rows_from = [](Panel panel, int64_t i) { return Panel{panel.data + i * panel.stride, panel.stride}; };
  if (kPairs && has_tiles()) {
    ds_on_tiles<false>(y_value, keys, NR, t.grad_lanes + lane, depth, t.p + lane, t.delta + lane, t.ds + lane);
    ds_on_tiles<true>(y_grad, keys, NR, t.value_lanes + lane, depth, t.r + lane, delta_y, t.ds + lane);
  } else {
    for_runs<score_rows(NR)>(keys, [&](auto rows, int64_t i) {
      constexpr int MR = static_cast<int>(rows);
      const int64_t at = i * kSideBlock + lane;
      ds_tile<kPairs, false, MR, NR>(rows_from(y_value, i), t.grad_lanes + lane, depth, t.p + at, t.delta + lane,
                                     t.ds + at);
      ds_tile<kPairs, true, MR, NR>(rows_from(y_grad, i), t.value_lanes + lane, depth, t.r + at, delta_y + i,
                                    t.ds + at);
    });
  }
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

// dy_key and dy_value of a block of y: each task in its turn.
template <bool kPairs>
void add_y_gradients(const BackwardCall& call, const BackwardTile& t, const KeyHead& head, int64_t j, int32_t rank,
                     int64_t queries, Panel x_query, Panel x_grad) {
  constexpr int64_t kStride = kPairs ? kSideBlock / 2 : kSideBlock;
  const AttentionParams& p = call.p.attention;
  const KeyBlock k = call.blocks.key_block(j);
  int32_t* const turn = call.turns + head.slot * call.blocks.key_blocks + j;
  const bool last = rank + 1 == call.blocks.query_blocks;
  wait_turn(turn, rank);
  const auto add = [&](const KeyGradient& gradient, const float* a, float factor, Panel columns, int64_t features) {
    if (!gradient.wanted(0)) return;
    const KeyGradient::View v = gradient.view(head.slot, head.b, head.h, 0, k.first);
    const bool direct = last && v.result.takes_products();
    Epilogue e{factor, rank == 0 ? nullptr : kOnes.values, v.sums, v.stride, nullptr, v.sums, v.stride};
    if (direct) e.to = v.result.data, e.to_stride = v.result.stride, e.to_dtype = v.result.dtype;
    multiply_features(kPairs, a, kStride, 1, k.count, columns, units<kPairs>(queries), features, e);
    if (last && !direct) gradient.finish(v, k.count);
  };
  add(call.grad_value, kPairs ? t.p_pairs : t.p, 1.f, x_grad, p.value_dim);
  add(call.grad_key, kPairs ? t.ds_pairs : t.ds, p.scale, x_query, p.head_dim);
  end_turn(turn, rank);
}

inline void load_x_stats(const BackwardCall& call, const QueryBlock& q, const KeyHead& head, const BackwardTile& t) {
  const AttentionParams& p = call.p.attention;
  const QuerySegment& x = p.queries[0];
  const int64_t row = (head.b * p.heads + head.h) * x.length + q.first;
  for (int64_t i = 0; i < q.vectors * VW; ++i) {
    const bool real = i < q.count;
    t.shift[i] = real ? call.p.x.shift[row + i] : 0.f;
    t.log2_sum[i] = real ? call.p.x.log2_sum[row + i] : kInfinity;
    t.delta[i] = !real ? 0.f
                       : row_delta(p.dtype, row_address(x.out, p.dtype, head.b, head.h, q.first + i),
                                   row_address(x.grad_out, p.dtype, head.b, head.h, q.first + i), p.value_dim);
  }
}

template <bool kPairs>
void backward_task(const BackwardCall& call, const KeyHead& head, int64_t block, const BackwardTile& t) {
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
  hidden_lanes(call.p, q, b, t.hidden);
  load_x_stats(call, q, head, t);

  const int64_t block_tiles = score_tiles(q.vectors, min(kSideBlock, p.keys[0].length));
  const int64_t tiles = block_tiles * call.blocks.key_blocks, size = element_size(p.dtype);
  const auto ahead = [&](const Rows& rows, int64_t features) { return next_rows(p, rows, features, q, b, h, tiles); };
  const auto to_write = [&](const Rows& rows, int64_t features) {
    if (rows.data == nullptr) return RowPrefetch();
    return RowPrefetch(row_address(rows, p.dtype, b, h, q.first), features * size, rows.row * size, q.count, tiles);
  };
  RowPrefetch next[4] = {ahead(x.query, p.head_dim), ahead(x.grad_out, p.value_dim), ahead(x.out, p.value_dim),
                         ahead(call.p.x_value, p.value_dim)};
  RowPrefetch own[2] = {to_write(x.grad_query, p.head_dim), to_write(call.p.grad_x_value, p.value_dim)};
  const auto between_tiles = [&] {
    for (RowPrefetch& rows : next) rows.step<false>();
    for (RowPrefetch& rows : own) rows.step<true>();
  };
  for (int64_t j = 0; j < call.blocks.key_blocks; ++j) {
    const KeyBlock k = call.blocks.key_block(j);
    const bool last = j + 1 == call.blocks.key_blocks;
    const int64_t y = (b * p.heads + h) * p.keys[0].length + k.first;
    const uint8_t* visible = visible_keys(call.p, k, b);
    const Panel y_value = call.values.rows(head.slot, b, h, 0, k.first);
    const Panel y_grad = call.y_grads.rows(head.slot, b, h, 0, k.first);
    for_score_groups<kPairs>(p, q, t.query_lanes, call.keys.rows(head.slot, b, h, 0, k.first), k.count, t.scores,
                             between_tiles, [&](auto vectors, int64_t lane, auto&) {
                               constexpr int NR = static_cast<int>(vectors);
                               make_probabilities<kPairs, NR>(call, t, lane, k.count, visible, call.p.y.shift + y,
                                                              call.p.y.log2_sum + y);
                               if (call.wants_ds()) {
                                 make_ds<kPairs, NR>(call, t, lane, k.count, y_value, y_grad, call.delta_y + y);
                               }
                             });
    if constexpr (kPairs) {
      if (call.wants_ds()) make_pairs(t.ds, k.count, q.vectors, t.ds_y_pairs, t.ds_pairs);
      if (call.want_x_value) make_pairs(t.r, k.count, q.vectors, t.r_y_pairs, nullptr);
    }
    // A gradient of the task's own rows, complete after the last block of y.
    const auto add = [&](const float* a, float factor, Panel columns, int64_t features, float* sums,
                         const Rows& result) {
      const int64_t stride = round_up(features, VW);
      const Destination to{row_address(result, p.dtype, b, h, q.first), p.dtype, result.row, features};
      const bool direct = last && to.takes_products();
      Epilogue e{factor, j == 0 ? nullptr : kOnes.values, sums, stride, nullptr, sums, stride};
      if (direct) e.to = to.data, e.to_stride = to.stride, e.to_dtype = to.dtype;
      multiply_features(kPairs, a, 1, kSideBlock, q.count, columns, units<kPairs>(k.count), features, e);
      if (last && !direct) store_rows(to, sums, stride, q.count, nullptr);
    };
    if (call.want_query) {
      add(kPairs ? t.ds_y_pairs : t.ds, p.scale, call.keys.columns(head.slot, b, h, 0, k.first), p.head_dim, t.dquery,
          x.grad_query);
    }
    if (call.want_x_value) {
      add(kPairs ? t.r_y_pairs : t.r, 1.f, call.y_grads.columns(head.slot, b, h, 0, k.first), p.value_dim, t.dvalue,
          call.p.grad_x_value);
    }
    add_y_gradients<kPairs>(call, t, head, j, static_cast<int32_t>(block), q.count, x_query, x_grad);
  }
}

template <bool kPairs>
void backward(const BidirectionalParams& params) {
  BackwardCall call(params);
  const AttentionParams& p = params.attention;
  call.keys.plan<kPairs>(p, false, true, call.want_query);
  call.values.plan<kPairs>(p, true, true, false);
  call.y_grads.plan<kPairs>(call.grads, true, true, call.want_x_value);
  call.grad_key.plan(p, false);
  call.grad_value.plan(p, true);
  const int64_t packed = call.keys.floats_per_head() + call.values.floats_per_head() + call.y_grads.floats_per_head();
  const int64_t per_head = packed + call.grad_key.floats_per_head() + call.grad_value.floats_per_head();
  const int64_t all = p.batch * p.heads, wave = heads_per_wave(p, per_head), length = p.keys[0].length;
  const int64_t blocks = call.blocks.query_blocks, key_blocks = call.blocks.key_blocks;

  Carver count(nullptr);
  BackwardTile::carve<kPairs>(p, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const Scratch scratch(p.workers.count * tile_size + wave * per_head), deltas(all * length);
  const Scratch turns(wave * key_blocks);
  float* memory = scratch.data() + p.workers.count * tile_size;
  call.keys.use(memory);
  call.values.use(memory += wave * call.keys.floats_per_head());
  call.y_grads.use(memory += wave * call.values.floats_per_head());
  call.grad_key.use(memory += wave * call.y_grads.floats_per_head());
  call.grad_value.use(memory + wave * call.grad_key.floats_per_head());
  call.turns = reinterpret_cast<int32_t*>(turns.data());
  call.delta_y = deltas.data();
  for_each_claim(p.workers, all * length, 64, [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t head = row / length, b = head / p.heads, h = head % p.heads, i = row % length;
      deltas.data()[row] = row_delta(p.dtype, row_address(params.y_out, p.dtype, b, h, i),
                                     row_address(params.grad_y_out, p.dtype, b, h, i), p.value_dim);
    }
  });

  for (int64_t begin = 0; begin < all; begin += wave) {
    const int64_t heads = min(wave, all - begin);
    if (packed > 0) pack_wave<BidirectionalBlocks>(p, begin, heads, call.keys, call.values, call.y_grads);
    std::memset(call.turns, 0, static_cast<size_t>(wave * key_blocks) * sizeof(int32_t));
    // A worker takes a whole head while there are plenty, so that dy_key and dy_value stay in its cache.
    const int64_t grain = heads >= 4 * p.workers.count ? blocks : 1;
    for_each_claim(p.workers, heads * blocks, grain, [&](int worker, int64_t first, int64_t last) {
      Carver carver(scratch.data() + worker * tile_size);
      const BackwardTile tile = BackwardTile::carve<kPairs>(p, carver);
      for (int64_t task = first; task < last; ++task) {
        const int64_t slot = task / blocks;
        backward_task<kPairs>(call, {slot, (begin + slot) / p.heads, (begin + slot) % p.heads}, task % blocks, tile);
      }
    });
  }
}

}  // namespace

void bidirectional_backward(const BidirectionalParams& p) {
  with_pairs(p.attention.dtype, p.attention.workers.tiles, is_worth_tiles(p.attention),
             [&](auto pairs) { backward<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk

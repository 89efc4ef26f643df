// What the drivers of the backward share, whichever side lies in their lanes: the call, what tasks do with the rows of
// x, and sums that tasks add to.
#pragma once

#include "csrc/attention/key_gradient.h"
#include "csrc/bidirectional_cross_attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

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
    grad_key.plan(params.attention, false);
    grad_value.plan(params.attention, true);
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

// What the probabilities and gradients of one side's rows are made with, [kSideBlock] each.
struct RowStats {
  float *shift, *log2_sum, *delta;

  static RowStats carve(Carver& memory) {
    return {memory.take(kSideBlock), memory.take(kSideBlock), memory.take(kSideBlock)};
  }
};

// Those of x. Rows up to a multiple of VW have no probability in x's softmax.
inline void load_x_stats(const BackwardCall& call, const QueryBlock& q, const KeyHead& head, const RowStats& to) {
  const AttentionParams& p = call.p.attention;
  const QuerySegment& x = p.queries[0];
  const int64_t row = (head.b * p.heads + head.h) * x.length + q.first;
  for (int64_t i = 0; i < q.vectors * VW; ++i) {
    const bool real = i < q.count;
    to.shift[i] = real ? call.p.x.shift[row + i] : 0.f;
    to.log2_sum[i] = real ? call.p.x.log2_sum[row + i] : kInfinity;
    to.delta[i] = !real ? 0.f
                        : row_delta(p.dtype, row_address(x.out, p.dtype, head.b, head.h, q.first + i),
                                    row_address(x.grad_out, p.dtype, head.b, head.h, q.first + i), p.value_dim);
  }
}

// The rows of x that the next task reads and those that this one writes, brought into cache within `steps` steps.
class TaskPrefetch {
 public:
  TaskPrefetch(const BackwardCall& call, const QueryBlock& q, const KeyHead& head, int64_t steps) {
    const AttentionParams& p = call.p.attention;
    const QuerySegment& x = p.queries[0];
    const auto ahead = [&](const Rows& rows, int64_t features) {
      return next_rows(p, rows, features, q, head.b, head.h, steps);
    };
    const auto to_write = [&](const Rows& rows, int64_t features) {
      if (rows.data == nullptr) return RowPrefetch();
      const int64_t size = element_size(p.dtype);
      return RowPrefetch(row_address(rows, p.dtype, head.b, head.h, q.first), features * size, rows.row * size, q.count,
                         steps);
    };
    next_[0] = ahead(x.query, p.head_dim);
    next_[1] = ahead(x.grad_out, p.value_dim);
    next_[2] = ahead(x.out, p.value_dim);
    next_[3] = ahead(call.p.x_value, p.value_dim);
    own_[0] = to_write(x.grad_query, p.head_dim);
    own_[1] = to_write(call.p.grad_x_value, p.value_dim);
  }
  MMK_INLINE void step() {
    for (RowPrefetch& rows : next_) rows.step<false>();
    for (RowPrefetch& rows : own_) rows.step<true>();
  }

 private:
  RowPrefetch next_[4], own_[2];
};

// A product of a task: A[rows][depth] as multiply_features reads it.
struct Factor {
  const float* data;
  int64_t row_stride, k_stride;
};

// Block j of y added to a gradient of the task's own rows, complete after the last: sums[x][features].
template <bool kPairs>
void add_x_gradient(const BackwardCall& call, const KeyHead& head, const QueryBlock& q, int64_t j, Factor a,
                    float factor, Panel columns, int64_t features, float* sums, const Rows& result) {
  const Dtype dtype = call.p.attention.dtype;
  const int64_t stride = round_up(features, VW);
  const Destination to{row_address(result, dtype, head.b, head.h, q.first), dtype, result.row, features};
  const bool last = j + 1 == call.blocks.key_blocks, direct = last && to.takes_products();
  Epilogue e{factor, j == 0 ? nullptr : kOnes.values, sums, stride, nullptr, sums, stride};
  if (direct) e.to = to.data, e.to_stride = to.stride, e.to_dtype = to.dtype;
  multiply_features(kPairs, a.data, a.row_stride, a.k_stride, q.count, columns,
                    units<kPairs>(call.blocks.key_block(j).count), features, e);
  if (last && !direct) store_rows(to, sums, stride, q.count, nullptr);
}

// Both of them.
template <bool kPairs>
void add_x_gradients(const BackwardCall& call, const KeyHead& head, const QueryBlock& q, int64_t j, Factor ds, Factor r,
                     float* dquery, float* dvalue) {
  const AttentionParams& p = call.p.attention;
  const int64_t first = call.blocks.key_block(j).first;
  if (call.want_query) {
    add_x_gradient<kPairs>(call, head, q, j, ds, p.scale, call.keys.columns(head.slot, head.b, head.h, 0, first),
                           p.head_dim, dquery, p.queries[0].grad_query);
  }
  if (call.want_x_value) {
    add_x_gradient<kPairs>(call, head, q, j, r, 1.f, call.y_grads.columns(head.slot, head.b, head.h, 0, first),
                           p.value_dim, dvalue, call.p.grad_x_value);
  }
}

// dy_key and dy_value of block j of y: each task in its turn, `rank` of its head. P and dS are rows of y at a stride.
template <bool kPairs>
void add_y_gradients(const BackwardCall& call, const KeyHead& head, int64_t j, int32_t rank, int64_t queries,
                     const float* p_rows, const float* ds_rows, int64_t row_stride, Panel x_query, Panel x_grad) {
  const AttentionParams& p = call.p.attention;
  const KeyBlock k = call.blocks.key_block(j);
  int32_t* const turn = call.turns + head.slot * call.blocks.key_blocks + j;
  const bool last = rank + 1 == call.blocks.query_blocks;
  const int64_t depth = units<kPairs>(queries);
  wait_turn(turn, rank);
  const auto add = [&](const KeyGradient& gradient, const float* a, float factor, Panel columns, int64_t features) {
    if (!gradient.wanted(0)) return;
    const KeyGradient::View v = gradient.view(head.slot, head.b, head.h, 0, k.first);
    if (kPairs && !last && has_tiles()) {  // tiles add by themselves; the factor comes with the last
      return multiply_tiles(
          {a, row_stride, k.count, columns.data, columns.stride, depth, ceil_div(features, VW), rank > 0}, v.sums,
          v.stride);
    }
    const bool direct = last && v.result.takes_products();
    Epilogue e{factor, rank == 0 ? nullptr : kOnes.values, v.sums, v.stride, nullptr, v.sums, v.stride};
    float factors[kSideBlock];  // of sums that have none yet
    if (kPairs && has_tiles()) {
      for (float& x : factors) x = factor;
      e.factor = 1.f, e.finish = factors;
    }
    if (direct) e.to = v.result.data, e.to_stride = v.result.stride, e.to_dtype = v.result.dtype;
    multiply_features(kPairs, a, row_stride, 1, k.count, columns, depth, features, e);
    if (last && !direct) gradient.finish(v, k.count);
  };
  add(call.grad_value, p_rows, 1.f, x_grad, p.value_dim);
  add(call.grad_key, ds_rows, p.scale, x_query, p.head_dim);
  end_turn(turn, rank);
}

// Runs the tasks of a call: task(call, head, block of x, tile), `Tile` being what a worker needs for one. `panels` are
// those of y that are packed once for a head.
template <class Tile, class Task, class... AllPanels>
void run_backward(BackwardCall& call, Task run_task, AllPanels&... panels) {
  const BidirectionalParams& params = call.p;
  const AttentionParams& p = params.attention;
  const int64_t packed = (panels.floats_per_head() + ...);
  const int64_t per_head = packed + call.grad_key.floats_per_head() + call.grad_value.floats_per_head();
  const int64_t all = p.batch * p.heads, wave = heads_per_wave(p, per_head), length = p.keys[0].length;
  const int64_t blocks = call.blocks.query_blocks, key_blocks = call.blocks.key_blocks;

  Carver count(nullptr);
  Tile::carve(p, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const Scratch scratch(p.workers.count * tile_size + wave * per_head), deltas(all * length);
  const Scratch turns(wave * key_blocks);
  float* memory = scratch.data() + p.workers.count * tile_size;
  const auto use = [&](auto& x) {
    x.use(memory);
    memory += wave * x.floats_per_head();
  };
  (use(panels), ...);
  use(call.grad_key);
  use(call.grad_value);
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
    if (packed > 0) pack_wave<BidirectionalBlocks>(p, begin, heads, panels...);
    std::memset(call.turns, 0, static_cast<size_t>(wave * key_blocks) * sizeof(int32_t));
    // A worker takes a whole head while there are plenty, so that dy_key and dy_value stay in its cache.
    const int64_t grain = heads >= 4 * p.workers.count ? blocks : 1;
    for_each_claim(p.workers, heads * blocks, grain, [&](int worker, int64_t first, int64_t last) {
      Carver carver(scratch.data() + worker * tile_size);
      const Tile tile = Tile::carve(p, carver);
      for (int64_t task = first; task < last; ++task) {
        const int64_t slot = task / blocks;
        run_task(KeyHead{slot, (begin + slot) / p.heads, (begin + slot) % p.heads}, task % blocks, tile);
      }
    });
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

//
//   x_out[i, :] = Σ_j softmax_j(S[i, j]) y_value[j, :],   y_out[j, :] = Σ_i softmax_i(S[i, j]) x_value[i, :]
//
// Tiling     a task owns a strip of one head's x and walks it in blocks of kSideBlock rows, and for each y in blocks of
//            as many. A block of S = Y·Xᵀ, x in the lanes, is formed once; two sets of exponentials are made of it,
//            less the running maxima of x's rows and of y's, and multiplied by y_value and by x_value. The sums of a
//            block of x are complete after its walk along y; those of y run along the strip.
// Threads    the number of strips of a head depends on the shape alone; their sums of y are merged in order.
// Precision  float32 throughout, or bfloat16 products accumulated in float32 where the instruction exists; running
//            maxima are subtracted before the exponential.
// Limits     any sizes and strides; features contiguous. On tiles: forward_tiles.h.
#include "csrc/bidirectional_cross_attention/forward_tiles.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// What a worker needs for one task.
struct ForwardTile {
  float *query, *x_value;       // Xᵀ [D][kSideBlock]; x_value as columns, [kSideBlock][Dv]
  float *scores, *of_x, *of_y;  // [keys][kSideBlock]; the same as probabilities of x's rows, and of y's
  float *total, *hidden;        // x_out [kSideBlock][Dv]; lanes that y does not attend to
  float *old_factor, *inverse;  // per row of a block
  Softmax x;

  static ForwardTile carve(const AttentionParams& p, Carver& memory) {
    constexpr int64_t block = (kSideBlock + 1) * kSideBlock;
    const int64_t dv = round_up(p.value_dim, VW);
    ForwardTile t;
    t.query = memory.take(p.head_dim * kSideBlock);
    t.x_value = memory.take(dv * kSideBlock);
    t.scores = memory.take(block);
    t.of_x = memory.take(block);
    t.of_y = memory.take(block);
    t.total = memory.take(dv * kSideBlock);
    t.hidden = memory.take(kSideBlock);
    t.old_factor = memory.take(kSideBlock);
    t.inverse = memory.take(kSideBlock);
    t.x = {memory.take(kSideBlock), memory.take(kSideBlock)};
    return t;
  }
};

// Running sums of all y of one head.
struct SumsOfY {
  float* total;  // [Ly][Dv]
  Softmax softmax;

  static int64_t floats(int64_t length, int64_t stride) { return length * stride + 2 * round_up(length, kSideBlock); }
  static SumsOfY at(float* memory, int64_t length, int64_t stride) {
    float* const shift = memory + length * stride;
    return {memory, {shift, shift + round_up(length, kSideBlock)}};
  }
};

struct ForwardCall {
  const BidirectionalParams& p;
  Exponents exponents;
  BidirectionalBlocks blocks;
  Panels keys, values;
  int64_t stride, strips;

  explicit ForwardCall(const BidirectionalParams& params)
      : p(params),
        exponents(params),
        blocks(params.attention),
        stride(round_up(params.attention.value_dim, VW)),
        strips(key_parts(params.attention.batch * params.attention.heads, blocks.query_blocks, 4)) {}

  int64_t y_length() const { return p.attention.keys[0].length; }
};

// One block of x against one of y.
template <bool kPairs>
void forward_block(const ForwardCall& call, const QueryBlock& q, const KeyHead& head, int64_t j, bool has_hidden,
                   Panel x_value, const ForwardTile& t, const SumsOfY& y, bool starts_y, const Destination& out,
                   RowPrefetch (&next)[2]) {
  const AttentionParams& p = call.p.attention;
  const KeyBlock k = call.blocks.key_block(j);
  const uint8_t* visible = visible_keys(call.p, k, head.b);
  const bool starts_x = j == 0, ends_x = j + 1 == call.blocks.key_blocks;
  RowPrefetch out_rows;  // met by the last block
  if (ends_x) {
    const int64_t size = element_size(p.dtype);
    out_rows = {out.data, out.features * size, out.stride * size, q.count, score_tiles(q.vectors, k.count)};
  }
  for_score_groups<kPairs>(
      p, q, t.query, call.keys.rows(head.slot, head.b, head.h, 0, k.first), k.count, t.scores,
      [&] {
        for (RowPrefetch& rows : next) rows.step<false>();
        out_rows.step<true>();
      },
      [&](auto vectors, int64_t lane, auto& best) {
        constexpr int NR = static_cast<int>(vectors);
        if (call.exponents.finishes || visible != nullptr) {
          finish_group<NR>(call.exponents, visible, k.count, t.scores + lane, best);
        }
        take_lanes<kPairs, NR>(call.exponents, t.scores + lane, visible, k.count, best,
                               {t.x.shift + lane, t.x.sum + lane}, t.old_factor + lane, t.of_x + lane);
      });
  const bool direct = ends_x && out.takes_products();
  if (ends_x) invert_sums(t.x.sum, q.count, t.inverse);
  Epilogue e{1.f, starts_x ? nullptr : t.old_factor, t.total, call.stride, nullptr, t.total, call.stride};
  if (direct) e.finish = t.inverse, e.to = out.data, e.to_stride = out.stride, e.to_dtype = out.dtype;
  multiply_features(kPairs, t.of_x, 1, kSideBlock, q.count, call.values.columns(head.slot, head.b, head.h, 0, k.first),
                    units<kPairs>(k.count), p.value_dim, e);
  if (ends_x && !direct) store_rows(out, t.total, call.stride, q.count, t.inverse);

  with_bool(has_hidden, [&](auto hides) {
    take_rows<kPairs, hides>(call.exponents, t.scores, t.hidden, k.count, q.vectors,
                             {y.softmax.shift + k.first, y.softmax.sum + k.first}, t.old_factor, t.of_y);
  });
  constexpr int64_t kStride = kPairs ? kSideBlock / 2 : kSideBlock;
  float* const total = y.total + k.first * call.stride;
  multiply_features(kPairs, t.of_y, kStride, 1, k.count, x_value, units<kPairs>(q.count), p.value_dim,
                    {1.f, starts_y ? nullptr : t.old_factor, total, call.stride, nullptr, total, call.stride});
}

// y_out of a block of y, its sums complete.
inline void finish_y(const ForwardCall& call, const KeyHead& head, const KeyBlock& k, const SumsOfY& y) {
  const AttentionParams& p = call.p.attention;
  float inverse[kSideBlock];
  invert_sums(y.softmax.sum + k.first, k.count, inverse);
  store_rows({row_address(call.p.y_out, p.dtype, head.b, head.h, k.first), p.dtype, call.p.y_out.row, p.value_dim},
             y.total + k.first * call.stride, call.stride, k.count, inverse);
  const Softmax softmax{y.softmax.shift + k.first, y.softmax.sum + k.first};
  softmax.store_stats(call.p.y, (head.b * p.heads + head.h) * call.y_length() + k.first, k.count);
}

template <bool kPairs>
void forward_task(const ForwardCall& call, const KeyHead& head, Range strip, const ForwardTile& t, const SumsOfY& y) {
  const AttentionParams& p = call.p.attention;
  const QuerySegment& x = p.queries[0];
  y.softmax.clear(round_up(call.y_length(), kSideBlock));
  for (int64_t block = strip.begin; block < strip.end; ++block) {
    const QueryBlock q = call.blocks.query_block(block);
    pack_lanes(kPairs, p.dtype, row_address(x.query, p.dtype, head.b, head.h, q.first), x.query.row, q.count,
               p.head_dim, t.query, kSideBlock);
    const Panel x_value = pack_columns<kPairs>(p.dtype, call.p.x_value, head.b, head.h, q, p.value_dim, t.x_value);
    const bool has_hidden = hidden_lanes(visible_queries(call.p, q, head.b), q.count, q.vectors, t.hidden);
    t.x.clear(kSideBlock);
    const Destination out{row_address(x.out, p.dtype, head.b, head.h, q.first), p.dtype, x.out.row, p.value_dim};
    const int64_t tiles = score_tiles(q.vectors, min(kSideBlock, call.y_length())) * call.blocks.key_blocks;
    RowPrefetch next[2] = {next_rows(p, x.query, p.head_dim, q, head.b, head.h, tiles),
                           next_rows(p, call.p.x_value, p.value_dim, q, head.b, head.h, tiles)};
    for (int64_t j = 0; j < call.blocks.key_blocks; ++j) {
      forward_block<kPairs>(call, q, head, j, has_hidden, x_value, t, y, block == strip.begin, out, next);
    }
    t.x.store_stats(call.p.x, (head.b * p.heads + head.h) * x.length + q.first, q.count);
  }
  if (call.strips > 1) return;
  for (int64_t j = 0; j < call.blocks.key_blocks; ++j) finish_y(call, head, call.blocks.key_block(j), y);
}

// The strips' sums of a block of y, in their order, into the first.
inline void merge_strips(const ForwardCall& call, const KeyBlock& k, const SumsOfY* strips) {
  for (int64_t i = k.first; i < k.first + k.count; ++i) {
    const SumsOfY& first = strips[0];
    float shift = first.softmax.shift[i];
    for (int64_t c = 1; c < call.strips; ++c) {
      const float other = strips[c].softmax.shift[i];
      if (!(other <= shift)) shift = other;
    }
    float sum = 0.f;
    float* const total = first.total + i * call.stride;
    for (int64_t c = 0; c < call.strips; ++c) {
      const float factor = std::exp2(strips[c].softmax.shift[i] - shift);
      const float* from = strips[c].total + i * call.stride;
      sum += factor * strips[c].softmax.sum[i];
      for (int64_t x = 0; x < call.stride; x += VW) {
        const vf term = set1(factor) * load(from + x);
        store(total + x, c == 0 ? term : load(total + x) + term);
      }
    }
    first.softmax.shift[i] = shift;
    first.softmax.sum[i] = sum;
  }
}

template <bool kPairs>
void forward(const BidirectionalParams& params) {
  ForwardCall call(params);
  const AttentionParams& p = params.attention;
  call.keys.plan<kPairs>(p, false, true, false);
  call.values.plan<kPairs>(p, true, false, true);
  const int64_t packed = call.keys.floats_per_head() + call.values.floats_per_head();
  const int64_t heads_of_all = p.batch * p.heads, wave = heads_per_wave(p, packed);
  const int64_t sums = round_up(SumsOfY::floats(call.y_length(), call.stride), 16);
  const int64_t slots = call.strips > 1 ? wave * call.strips : p.workers.count;

  Carver count(nullptr);
  ForwardTile::carve(p, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const Scratch scratch(p.workers.count * tile_size + wave * packed + slots * sums);
  float* const panels = scratch.data() + p.workers.count * tile_size;
  float* const sums_memory = panels + wave * packed;
  call.keys.use(panels);
  call.values.use(panels + wave * call.keys.floats_per_head());
  const auto sums_at = [&](int64_t slot) {
    return SumsOfY::at(sums_memory + slot * sums, call.y_length(), call.stride);
  };

  for (int64_t begin = 0; begin < heads_of_all; begin += wave) {
    const int64_t heads = min(wave, heads_of_all - begin);
    const auto head_of = [&](int64_t i) { return KeyHead{i, (begin + i) / p.heads, (begin + i) % p.heads}; };
    if (packed > 0) pack_wave<BidirectionalBlocks>(p, begin, heads, call.keys, call.values);
    for_each_claim(p.workers, heads * call.strips, 1, [&](int worker, int64_t first, int64_t last) {
      Carver memory(scratch.data() + worker * tile_size);
      const ForwardTile tile = ForwardTile::carve(p, memory);
      for (int64_t task = first; task < last; ++task) {
        const int64_t blocks = call.blocks.query_blocks, strip = task % call.strips;
        forward_task<kPairs>(call, head_of(task / call.strips),
                             {blocks * strip / call.strips, blocks * (strip + 1) / call.strips}, tile,
                             sums_at(call.strips > 1 ? task : worker));
      }
    });
    if (call.strips == 1) continue;
    for_each_claim(p.workers, heads * call.blocks.key_blocks, 1, [&](int, int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t head = task / call.blocks.key_blocks;
        const KeyBlock k = call.blocks.key_block(task % call.blocks.key_blocks);
        SumsOfY strips[kMaxParts];
        for (int64_t c = 0; c < call.strips; ++c) strips[c] = sums_at(head * call.strips + c);
        merge_strips(call, k, strips);
        finish_y(call, head_of(head), k, strips[0]);
      }
    });
  }
}

}  // namespace

void bidirectional_forward(const BidirectionalParams& p) {
  with_pairs(p.attention.dtype, p.attention.workers.tiles, is_worth_tiles(p.attention), [&](auto pairs) {
    if constexpr (pairs) {
      if (p.attention.workers.tiles != TileUnit::none) return TiledForward(p).run();
    }
    forward<pairs>(p);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk

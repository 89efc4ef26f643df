//
//   O[i, :] = Σ_j P[i, j] V[j, :] / Σ_j P[i, j],   P = exp(S - row_max),   S = mask(scale · Q Kᵀ)
//
// Tiling     a task owns up to kMaxGroups groups of kLanes queries of one head (three vectors: 24 on AVX2, 48 on
//            AVX-512) and walks the keys in blocks of kKeyBlock, so that a block of K and V is read from afar once for
//            all groups. Sᵀ = K·Qᵀ with the queries in the lanes: K is read as it lies, and maximum, sum and
//            exponential need no work across lanes. Qᵀ [D][lanes], S [keys][lanes] and the running O [lanes][Dv] of a
//            group stay in level-1 cache. P·V broadcasts from that same S and reads V as it lies; the last block's
//            product is O and leaves in O's dtype.
// Tiles      groups are four vectors wide, and blocks of keys longer: S then comes from level-2 cache, which costs less
//            than taking the running O up again. O is kept as Oᵀ [Dv][lanes] and turned once, at its end. With few
//            keys groups are two vectors wide.
// Threads    tasks are independent. With few queries the keys are cut into parts whose number depends on the shape
//            alone; partial results are merged in order.
// Precision  float32 throughout, or bfloat16 products accumulated in float32 where the instruction exists (P is then
//            rounded to bfloat16); the running maximum is subtracted before rounding, row_max and log_sum kept apart.
// Limits     any sizes, strides and number of segments; features contiguous.
#include "csrc/attention/partial.h"
#include "csrc/attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// How a call is cut: into groups of at most kVectors of queries, kMaxGroups of them to a task, and blocks of keys.
template <bool pairs>
struct OnLanes {
  static constexpr bool kPairs = pairs, kTiles = false;
  static constexpr int kVectors = kScoreVectors, kWhole = 0, kMaxGroups = 96 / (kVectors * VW), kKeyBlock = 128;
};
template <int vectors, int key_block>
struct OnTiles {
  static constexpr bool kPairs = true, kTiles = true;
  static constexpr int kVectors = vectors, kWhole = vectors, kMaxGroups = 8 / vectors, kKeyBlock = key_block;
};
// What a group of few keys works on then fits in level-1 cache; that of many passes through level 2 whatever its width.
constexpr int kFewKeys = 128;
using FewKeysOnTiles = OnTiles<2, kFewKeys>;
using ManyKeysOnTiles = OnTiles<4, 1024>;
template <class On>
using ForwardBlocks = Blocks<On::kMaxGroups, On::kKeyBlock, On::kWhole>;
template <class On>
constexpr int kGroupLanes = On::kVectors * VW;
template <class On>
constexpr int kTaskLanes = On::kMaxGroups * kGroupLanes<On>;

// What a worker needs for one task: per group Qᵀ and the running O, and for the group at hand the rest.
struct ForwardTile {
  float *query, *total, *scores, *mask, *second_mask, *dropout;

  template <class On>
  static ForwardTile carve(const AttentionParams& p, Carver& memory) {
    const int64_t block = (On::kKeyBlock + 1) * kGroupLanes<On>;
    return {memory.take(p.head_dim * kTaskLanes<On>),
            memory.take(round_up(p.value_dim, VW) * kTaskLanes<On>),
            memory.take(block),
            memory.take(p.mask.data != nullptr ? block : 0),
            memory.take(p.second_mask.data != nullptr ? block : 0),
            memory.take(p.dropout_p > 0.f ? block : 0)};
  }
};

// The softmax of a group so far, one entry per lane; row_max in scores, shift the same as an exponent of 2.
template <class On>
struct RunningSoftmax {
  static constexpr bool kPairs = On::kPairs;
  static constexpr int kLanes = kGroupLanes<On>;
  alignas(64) float row_max[kLanes], shift[kLanes], sum[kLanes];

  void clear(const SoftmaxStart& start) {
    for (int i = 0; i < kLanes; ++i) {
      row_max[i] = start.row_max;
      shift[i] = exponent_shift(start.row_max);
      sum[i] = start.sum;
    }
  }

  // Replaces the scores by their exponentials and takes in the block's maxima; old_factor is what becomes of older
  // sums.
  template <int NR>
  MMK_NOINLINE void take_block(const ScoreSteps& steps, float* scores, int64_t keys, float bias, const vf (&best)[NR],
                               float* dropout, float* old_factor) {
    const auto probability = [](vf x) { return On::kTiles ? exp2_beside_tiles(x) : exp2<kPairs ? 3 : 5>(x); };
    vf scale = set1(steps.exponent_scale), block_sum[NR], minus_shift[NR];
    bias = steps.late_bias(bias);
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      const vf raised = max(load(row_max + j * VW), fma(best[j], set1(steps.score_scale), set1(bias)));
      const vf raised_shift = exponent_shift(raised);
      const vi apart = is_huge(raised);
      const vf lowered = (load(row_max + j * VW) - raised) * set1(kLog2e);
      store(old_factor + j * VW, exp2<5>(select(apart, lowered, load(shift + j * VW) - raised_shift)));
      store(row_max + j * VW, raised);
      store(shift + j * VW, raised_shift);
      minus_shift[j] = bias_less_shift(bias, raised_shift);
      block_sum[j] = zero();
    }
    if (!steps.scale_first && any_is_huge(row_max, NR * VW)) {
      make_huge_exponents<NR, kLanes>(steps, bias, row_max, minus_shift, keys, scores);
      scale = set1(1.f);
      MMK_UNROLL for (int j = 0; j < NR; ++j) minus_shift[j] = zero();
    }
    if (kPairs && keys % 2 != 0) {
      MMK_UNROLL for (int j = 0; j < NR; ++j) store(scores + keys * kLanes + j * VW, set1(-kInfinity));
      if (dropout != nullptr) std::memset(dropout + keys * kLanes, 0, sizeof(float) * kLanes);
    }
    for (int64_t i = 0; i < keys; i += 2) {
      const bool both = kPairs || i + 1 < keys;
      MMK_UNROLL for (int j = 0; j < NR; ++j) {
        float* s = scores + i * kLanes + j * VW;
        vf even = probability(fma(load(s), scale, minus_shift[j]));
        vf odd = both ? probability(fma(load(s + kLanes), scale, minus_shift[j])) : zero();
        block_sum[j] = block_sum[j] + (even + odd);
        if (dropout != nullptr) {
          even = even * load(dropout + i * kLanes + j * VW);
          if (both) odd = odd * load(dropout + (i + 1) * kLanes + j * VW);
        }
        if constexpr (kPairs) {
          store(scores + i / 2 * kLanes + j * VW, pair(even, odd));
        } else {
          store(s, even);
          if (both) store(s + kLanes, odd);
        }
      }
    }
    MMK_UNROLL for (int j = 0; j < NR; ++j) {
      store(sum + j * VW, fma(load(sum + j * VW), load(old_factor + j * VW), block_sum[j]));
    }
    if constexpr (On::kTiles) {  // what the product's last tile reads behind the keys
      for (int64_t i = units<true>(keys); i % kTileUnits != 0; ++i) {
        MMK_UNROLL for (int j = 0; j < NR; ++j) store(scores + i * kLanes + j * VW, zero());
      }
    }
  }
};

// row_max and log_sum of `count` queries from row on, if the caller wants them.
inline void store_stats(const ScoreSteps& steps, const QuerySegment& s, int64_t row, int64_t count,
                        const float* row_max, const float* sum) {
  if (s.row_max == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    const bool empty = sum[i] == 0.f;
    s.row_max[row + i] = empty ? -kInfinity : row_max[i];
    s.log_sum[row + i] = empty ? -kInfinity : std::log(sum[i]) + steps.hidden_by_shift(row_max[i]);
  }
}

template <class On>
struct ForwardCall {
  const AttentionParams& p;
  ScoreSteps steps;
  int64_t groups;  // to a task, at most
  ForwardBlocks<On> longest;
  Panels keys, values;
  int64_t parts = 1;

  explicit ForwardCall(const AttentionParams& params)
      : p(params), steps(params), groups(groups_per_task(params)), longest(params, kLongest, groups) {
    if (longest.queries <= kFewQueries)
      parts = key_parts(p.batch * p.heads * longest.query_blocks, longest.key_blocks, On::kTiles ? 1 : 2);
  }
  ForwardBlocks<On> blocks(int64_t b) const { return ForwardBlocks<On>(p, b, groups); }

 private:
  // More groups to a task read K and V less often; fewer leave something to every worker. No result depends on it.
  static int64_t groups_per_task(const AttentionParams& p) {
    const int64_t groups = p.batch * p.heads * ceil_div(ForwardBlocks<On>(p).queries, kGroupLanes<On>);
    return max(1, min(On::kMaxGroups, groups / (4 * p.workers.count)));
  }
};

// One group of a task.
template <class On>
struct Group {
  QueryBlock queries;
  int64_t lane;        // of its first query among those of the task
  Range any, all;      // keys that some, and that every, query of the group attends to
  int64_t last_block;  // the last block of keys with any of them
  bool started, finished;
  RunningSoftmax<On> softmax;
  float *query, *total;  // on tiles, total is Oᵀ [Dv][lanes]

  // What becomes of the sums in the end.
  void write(const Destination& out, int64_t stride, const float* inverse) const {
    if (On::kTiles) {
      store_lanes(total, kGroupLanes<On>, queries.count, out.features, inverse, out.data, out.stride);
    } else {
      store_rows(out, total, stride, queries.count, inverse);
    }
  }
};

// Oᵀ so far, when maxima rise: mostly none does.
template <int NR>
void lower_lanes(float* total, int64_t stride, int64_t features, const float* factor) {
  vi lowered = load(factor) != set1(1.f);
  MMK_UNROLL for (int j = 1; j < NR; ++j) lowered = lowered | (load(factor + j * VW) != set1(1.f));
  if (max_lane(select(lowered, set1(1.f), zero())) == 0.f) return;
  for (int64_t i = 0; i < features; ++i, total += stride) {
    MMK_UNROLL for (int j = 0; j < NR; ++j) store(total + j * VW, load(total + j * VW) * load(factor + j * VW));
  }
}

template <class On, int NR>
void forward_group(const ForwardCall<On>& call, Group<On>& group, const ScoreBlock& block, const Window& window,
                   int64_t slot, const ForwardTile& tile, bool last_block, const Destination* out,
                   RowPrefetch (&next)[4]) {
  constexpr bool kPairs = On::kPairs;
  constexpr int kLanes = kGroupLanes<On>;
  const AttentionParams& p = call.p;
  const int s = static_cast<int>(block.segment - p.keys);
  const int64_t depth = units<kPairs>(p.head_dim), stride = round_up(p.value_dim, VW);
  const Panel keys = call.keys.rows(slot, block.b, block.kv_head, s, block.key_in_segment);
  const Panel values = call.values.columns(slot, block.b, block.kv_head, s, block.key_in_segment);
  float* const dropout = p.dropout_p > 0.f ? tile.dropout : nullptr;
  MaskTile mask;
  mask.entries = tile.mask;
  mask.second = tile.second_mask;
  load_mask_tile(p, block, kLanes, mask);
  if (mask.all_masked) return;

  RowPrefetch rows_of_out;  // met by the last block
  if (last_block && out != nullptr) {
    const int64_t size = element_size(out->dtype);
    rows_of_out = {out->data, out->features * size, out->stride * size, group.queries.count,
                   max(1, block.keys / score_rows(NR))};
  }
  vf best[NR];
  MMK_UNROLL for (int j = 0; j < NR; ++j) best[j] = set1(-kInfinity);
  const bool inside = group.all.begin <= block.key && block.key + block.keys <= group.all.end;
  const bool masks_at_once = inside && mask.kind == MaskTile::full && call.steps.only_mask();
  with_bool(masks_at_once, [&](auto masks) {
    multiply_scores<kPairs, masks, NR, kLanes>(keys, block.keys, group.query, depth, tile.scores, best,
                                               {p.scale, mask.entries}, [&] {
                                                 for (RowPrefetch& x : next) x.step<false>();
                                                 rows_of_out.step<true>();
                                               });
  });
  if (!masks_at_once && (call.steps.always || !inside)) {
    finish_scores<NR, kLanes>(p, call.steps, block, window, mask, 0, tile.scores, nullptr, best);
  }
  if (dropout != nullptr) dropout_factors(p, block, NR * VW, kLanes, dropout);
  alignas(64) float old_factor[kLanes], inverse[kLanes];
  group.softmax.template take_block<NR>(call.steps, tile.scores, block.keys, block.bias, best, dropout, old_factor);

  group.finished = last_block && out != nullptr;
  if constexpr (On::kTiles) {
    // Values are zeros behind the last key, up to a whole tile.
    const bool is_end = block.key_in_segment + block.keys == length_of(*block.segment, block.b);
    const int64_t keys = units<true>(block.keys), depth = is_end ? round_up(keys, kTileUnits) : keys;
    if (group.finished) invert_sums(group.softmax.sum, NR * VW, inverse);
    if (group.finished && !group.started) {
      group.started = true;
      return store_turned_features(tile.scores, kLanes, group.queries.count, values, depth, p.value_dim, inverse,
                                   out->data, out->stride);
    }
    if (group.started) lower_lanes<NR>(group.total, kLanes, stride, old_factor);
    multiply_turned_features(tile.scores, kLanes, NR, values, depth, p.value_dim, group.started, group.total, kLanes);
    group.started = true;
    if (group.finished) group.write(*out, stride, inverse);
    return;
  }
  const bool direct = group.finished && out->takes_products();
  if (group.finished) invert_sums(group.softmax.sum, group.queries.count, inverse);
  multiply_features(
      kPairs, tile.scores, 1, kLanes, group.queries.count, values, units<kPairs>(block.keys), p.value_dim,
      {1.f, group.started ? old_factor : nullptr, group.total, stride, direct ? inverse : nullptr,
       direct ? out->data : group.total, direct ? out->stride : stride, direct ? out->dtype : Dtype::f32});
  group.started = true;
  if (group.finished && !direct) group.write(*out, stride, inverse);
}

// One task: a block of queries against the key blocks of `part`.
template <class On>
void forward_task(const ForwardCall<On>& call, const ForwardBlocks<On>& blocks, const QueryBlock& queries, int64_t b,
                  int64_t h, int64_t slot, Range part, bool first_part, const KeyHead* next_head,
                  const ForwardTile& tile, const Partial* partial) {
  constexpr bool kPairs = On::kPairs;
  constexpr int64_t kLanes = kGroupLanes<On>;
  const AttentionParams& p = call.p;
  const int64_t stride = round_up(p.value_dim, VW), groups = ceil_div(queries.vectors, On::kVectors);
  const QuerySegment& segment = *queries.segment;
  const Window window(p, b, blocks.queries, blocks.keys);
  const auto out_of = [&](const QueryBlock& q) {
    return Destination{row_address(segment.out, p.dtype, b, h, q.first), p.dtype, segment.out.row, p.value_dim};
  };

  const SoftmaxStart start(p, call.steps, h, first_part);
  const AttentionMask& distant_mask = larger_mask(p);
  Group<On> group[On::kMaxGroups];
  for (int64_t g = 0; g < groups; ++g) {
    Group<On>& x = group[g];
    x.queries = group_of<On::kWhole>(queries, g, groups);
    x.lane = x.queries.first - queries.first;
    x.any = window.any(x.queries.position, x.queries.count);
    x.all = window.all(x.queries.position, x.queries.count);
    x.started = x.finished = false;
    x.softmax.clear(start);
    x.query = tile.query + g * p.head_dim * kLanes;
    x.total = (partial != nullptr && !On::kTiles ? partial->total : tile.total) + x.lane * stride;
    x.last_block = part.end - 1;
    while (x.last_block > part.begin &&
           score_block<kPairs>(p, blocks.key_block(x.last_block), x.any, x.queries, b, h).keys == 0) {
      --x.last_block;
    }
    pack_lanes(kPairs, p.dtype, row_address(segment.query, p.dtype, b, h, x.queries.first), segment.query.row,
               x.queries.count, p.head_dim, x.query, kLanes);
  }
  const int64_t block_tiles = score_tiles(queries.vectors, min(On::kKeyBlock, blocks.keys));
  int64_t last_block = part.begin - 1;
  for (int64_t g = 0; g < groups; ++g) last_block = max(last_block, group[g].last_block);
  RowPrefetch next[4];  // queries; keys, values and mask
  next[0] = next_rows(p, segment.query, p.head_dim, queries, b, h, block_tiles * (last_block + 1 - part.begin));
  for (int64_t j = part.begin; j <= last_block; ++j) {
    const KeyBlock keys = blocks.key_block(j);
    const KeyHead here{slot, b, h / (p.heads / p.kv_heads)};
    const KeyHead* const head = j < last_block ? &here : next_head;
    if (!On::kTiles && head != nullptr) {  // tiles wait less for rows than it takes to ask for them early
      const KeyBlock ahead = blocks.key_block(j < last_block ? j + 1 : 0);
      next[1] = call.keys.prefetch(false, *head, ahead, block_tiles);
      next[2] = call.values.prefetch(true, *head, ahead, block_tiles);
    }
    next[3] = j < last_block ? prefetch_mask(distant_mask, b, h, queries.position, queries.count,
                                             blocks.key_block(j + 1), block_tiles)
                             : prefetch_mask(distant_mask, b, h, queries.position + queries.count, queries.count,
                                             blocks.key_block(part.begin), block_tiles);
    for (int64_t g = 0; g < groups; ++g) {
      const ScoreBlock block = score_block<kPairs>(p, keys, group[g].any, group[g].queries, b, h);
      if (block.keys == 0) continue;
      const Destination out = out_of(group[g].queries);
      with_constant<On::kVectors>(group[g].queries.vectors, [&](auto vectors) {
        forward_group<On, static_cast<int>(vectors)>(call, group[g], block, window, slot, tile,
                                                     j == group[g].last_block, partial == nullptr ? &out : nullptr,
                                                     next);
      });
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const Group<On>& x = group[g];
    const int64_t count = x.queries.count;
    if (!x.started) {
      std::memset(x.total, 0, sizeof(float) * static_cast<size_t>((On::kTiles ? kLanes : count) * stride));
    }
    if (partial != nullptr) {
      if (On::kTiles) {
        write_transposed(x.total, kLanes, stride, count, Dtype::f32, partial->total + x.lane * stride, stride);
      }
      std::memcpy(partial->row_max + x.lane, x.softmax.row_max, sizeof(float) * static_cast<size_t>(count));
      std::memcpy(partial->sum + x.lane, x.softmax.sum, sizeof(float) * static_cast<size_t>(count));
      continue;
    }
    store_stats(call.steps, segment, number_at(p, segment, p.heads, b, h, x.queries.first), count, x.softmax.row_max,
                x.softmax.sum);
    if (x.finished) continue;
    float inverse[kLanes];  // nothing to attend to, or the last blocks were masked as a whole
    invert_sums(x.softmax.sum, x.queries.vectors * VW, inverse);
    x.write(out_of(x.queries), stride, inverse);
  }
}

template <class On>
void merge_parts(const ForwardCall<On>& call, const QueryBlock& queries, int64_t b, int64_t h, const Partial* parts,
                 const ForwardTile& tile) {
  const AttentionParams& p = call.p;
  const QuerySegment& segment = *queries.segment;
  const int64_t stride = round_up(p.value_dim, VW);
  float row_max[kTaskLanes<On>], sum[kTaskLanes<On>], inverse[kTaskLanes<On>];
  merge_partials(parts, call.parts, queries.count, stride, {tile.total, row_max, sum});
  store_stats(call.steps, segment, number_at(p, segment, p.heads, b, h, queries.first), queries.count, row_max, sum);
  invert_sums(sum, queries.count, inverse);
  store_rows({row_address(segment.out, p.dtype, b, h, queries.first), p.dtype, segment.out.row, p.value_dim},
             tile.total, stride, queries.count, inverse);
}

template <class On>
void forward(const AttentionParams& p) {
  ForwardCall<On> call(p);
  call.keys.template plan<On::kPairs>(p, false, true, false);
  call.values.template plan<On::kPairs>(p, true, false, true);
  const int64_t packed = call.keys.floats_per_head() + call.values.floats_per_head();
  const int64_t wave = heads_per_wave(p, packed), group = p.heads / p.kv_heads;
  const int64_t stride = round_up(p.value_dim, VW), partial_size = Partial::floats(kTaskLanes<On>, stride);
  if (call.longest.query_blocks == 0) return;
  const TaskGrid grid(p, call.parts, p.queries[0].starts != nullptr,
                      [&](int64_t b) { return call.blocks(b).query_blocks; });

  Carver count(nullptr);
  ForwardTile::carve<On>(p, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const int64_t partials = call.parts > 1 ? wave * group * call.longest.query_blocks * call.parts : 0;
  const Scratch scratch(p.workers.count * tile_size + wave * packed + partials * partial_size);
  float* const panels = scratch.data() + p.workers.count * tile_size;
  float* const partial_memory = panels + wave * packed;
  call.keys.use(panels);
  call.values.use(panels + wave * call.keys.floats_per_head());
  const auto tile_of = [&](int worker) {
    Carver memory(scratch.data() + worker * tile_size);
    return ForwardTile::carve<On>(p, memory);
  };
  const auto partial_of = [&](int64_t task) {
    return Partial::at(partial_memory + task * partial_size, kTaskLanes<On>, stride);
  };

  for (int64_t begin = 0; begin < p.batch * p.kv_heads; begin += wave) {
    const int64_t heads = min(wave, p.batch * p.kv_heads - begin);
    const int64_t before = grid.tasks(begin), tasks = grid.tasks(begin + heads) - before;
    if (packed > 0) pack_wave<ForwardBlocks<On>>(p, begin, heads, call.keys, call.values);
    for_each_claim(p.workers, tasks, 1, [&](int worker, int64_t first, int64_t last) {
      const ForwardTile tile = tile_of(worker);
      for (int64_t task = first; task < last; ++task) {
        const TaskGrid::Place place = grid.place(before + task);
        const ForwardBlocks<On> blocks = call.blocks(place.b);
        const int64_t part = place.task % call.parts, block = place.task / call.parts;
        const int64_t h = place.kv_head * group + block / blocks.query_blocks;
        const Range range{blocks.key_blocks * part / call.parts, blocks.key_blocks * (part + 1) / call.parts};
        const Partial partial = partial_of(task);
        const int64_t head = place.b * p.kv_heads + place.kv_head;
        const int64_t following = before + task + 1 < grid.tasks(head + 1) ? head : head + 1;
        const KeyHead next{following - begin, following / p.kv_heads, following % p.kv_heads};
        const bool meets_keys = following < begin + heads && (following != head || blocks.key_blocks > 1);
        forward_task<On>(call, blocks, blocks.query_block(block % blocks.query_blocks), place.b, h, head - begin, range,
                         part == 0, meets_keys ? &next : nullptr, tile, call.parts > 1 ? &partial : nullptr);
      }
    });
    if (call.parts == 1) continue;
    for_each_claim(p.workers, tasks / call.parts, 1, [&](int worker, int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const TaskGrid::Place place = grid.place(before + task * call.parts);
        const ForwardBlocks<On> blocks = call.blocks(place.b);
        const int64_t block = place.task / call.parts;
        Partial parts[kMaxParts];
        for (int64_t c = 0; c < call.parts; ++c) parts[c] = partial_of(task * call.parts + c);
        merge_parts(call, blocks.query_block(block % blocks.query_blocks), place.b,
                    place.kv_head * group + block / blocks.query_blocks, parts, tile_of(worker));
      }
    });
  }
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  with_pairs(p.dtype, p.workers.tiles, is_worth_tiles(p), [&](auto pairs) {
    if constexpr (pairs) {
      if (p.workers.tiles != TileUnit::none) {
        int64_t keys = 0;
        for (int s = 0; s < p.key_segments; ++s) keys += p.keys[s].length;
        return keys <= kFewKeys ? forward<FewKeysOnTiles>(p) : forward<ManyKeysOnTiles>(p);
      }
    }
    forward<OnLanes<pairs>>(p);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk

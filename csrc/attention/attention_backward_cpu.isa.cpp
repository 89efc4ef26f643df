//
//   P = exp(S - row_max - log_sum),   dP = dO Vᵀ,   dS = P ∘ (dP - δ),   δ = Σ_d O ∘ dO - d log_sum
//   dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = Pᵀ dO,   dmask = dS,   dbias = Σ dS over two segments,
//   dsink = -Σ exp(sink - row_max - log_sum) δ over the rows of its head
//
// Tiling     a task owns kQueryBlock queries of one head and walks the keys in blocks of as many, once: five products a
//            block. S and dP are made with the queries in the lanes, as in the forward; dQ of the task stays in cache,
//            dK and dV of the block are read and written once per task.
// Threads    the tasks of a head add to the same dK and dV. They do so in the order of the tasks, each waiting for its
//            turn at a block of keys: tasks follow one another through the keys like a wave, the sums need no copies,
//            and no bit depends on the number of threads. The same holds for a broadcast mask's gradient. With few
//            queries the keys are cut into parts instead, whose dQ are added in order; not so for the gradient of the
//            segments' bias, which needs whole rows. Shares of that gradient and of the sinks' are added up at the
//            end, in order.
// Precision  P is recomputed by the very operations of the forward, from row_max and log_sum apart. A product starts
//            its accumulators at zero and is added to the running sum at its end, in float32.
// Limits     as the forward.
#include "csrc/attention/backward_block.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
void backward_task(const BackwardCall& call, const BackwardBlocks& blocks, const Task& task, const KeyHead* next_head,
                   const BackwardTile& tile, float* partial_dq, float* bias_sums, float* sink_share) {
  const AttentionParams& p = call.p;
  const int64_t b = task.b, h = task.h, dq_stride = round_up(p.head_dim, VW);
  const QueryBlock q = blocks.query_block(task.t);
  const QuerySegment& segment = *q.segment;
  const Window window(p, b, blocks.queries, blocks.keys);
  const Range any = window.any(q.position, q.count), all = window.all(q.position, q.count);
  const Range part{blocks.key_blocks * task.part / call.parts, blocks.key_blocks * (task.part + 1) / call.parts};
  float* const dq = partial_dq != nullptr ? partial_dq : tile.dq;

  RowStats stats;
  load_stats(call, q, b, h, stats);
  if (sink_share != nullptr) {
    *sink_share = 0.f;
    for (int64_t i = 0; task.part == 0 && i < q.count; ++i)
      *sink_share += stats.sink_gradient(call.steps, p.sinks[h], i);
    if (call.sinks_alone) return;
  }

  const void* query = row_address(segment.query, p.dtype, b, h, q.first);
  const void* grad = row_address(segment.grad_out, p.dtype, b, h, q.first);
  pack_lanes(kPairs, p.dtype, query, segment.query.row, q.count, p.head_dim, tile.query_lanes, kQueryBlock);
  pack_lanes(kPairs, p.dtype, grad, segment.grad_out.row, q.count, p.value_dim, tile.grad_lanes, kQueryBlock);
  const Panel query_columns = pack_columns<kPairs>(p.dtype, segment.query, b, h, q, p.head_dim, tile.query_columns);
  const Panel grad_columns = pack_columns<kPairs>(p.dtype, segment.grad_out, b, h, q, p.value_dim, tile.grad_columns);

  const int groups = static_cast<int>(ceil_div(q.vectors, kScoreVectors));
  const int64_t block_tiles = score_tiles(q.vectors, min(kKeyBlock, blocks.keys));
  const int64_t tiles = block_tiles * part.size(), element = element_size(p.dtype);
  RowPrefetch next_query = next_rows(p, segment.query, p.head_dim, q, b, h, tiles);
  RowPrefetch next_grad = next_rows(p, segment.grad_out, p.value_dim, q, b, h, tiles);
  RowPrefetch next_out = next_rows(p, segment.out, p.value_dim, q, b, h, tiles);
  RowPrefetch next_dq;
  const bool want_query = segment.grad_query.data != nullptr;
  if (want_query && partial_dq == nullptr) {
    const Rows& rows = segment.grad_query;
    next_dq = {row_address(rows, p.dtype, b, h, q.first), p.head_dim * element, rows.row * element, q.count, tiles};
  }

  if (bias_sums != nullptr) std::memset(tile.bias_sums, 0, sizeof(float) * 2 * kMaxSegments * kQueryBlock);
  bool first = true, finished_dq = false;
  for (int64_t j = part.begin; j < part.end; ++j) {
    const bool finishes_dq = j + 1 == part.end && partial_dq == nullptr && p.head_dim % VW == 0;
    const KeyBlock keys = blocks.key_block(j);
    ScoreBlock block = score_block<kPairs>(p, keys, any, q, b, h);
    if (!call.wants(segment, keys.index)) block.keys = 0;
    MaskTile mask;
    mask.entries = tile.mask;
    mask.second = tile.second_mask;
    if (block.keys > 0) load_mask_tile(p, block, kQueryBlock, mask);
    if (mask.all_masked) block.keys = 0;
    if (block.keys > 0) {
      const Panel key_rows = call.keys.rows(task.slot, b, task.kv_head, keys.index, block.key_in_segment);
      const Panel value_rows = call.values.rows(task.slot, b, task.kv_head, keys.index, block.key_in_segment);
      const Panel key_columns = call.keys.columns(task.slot, b, task.kv_head, keys.index, block.key_in_segment);
      const bool inside = all.begin <= block.key && block.key + block.keys <= all.end;
      const bool finish = call.steps.always || !inside;
      const bool masks_at_once = inside && mask.kind == MaskTile::full && call.steps.only_mask();
      if (p.dropout_p > 0.f) dropout_factors(p, block, q.vectors * VW, kQueryBlock, tile.dropped);
      std::memset(tile.mask_key_sums, 0, sizeof(float) * kKeyBlock);
      // What the block adds to at its end, and what the next block reads.
      RowPrefetch sums[3] = {call.grad_key.prefetch(task.slot, b, task.kv_head, keys, block_tiles),
                             call.grad_value.prefetch(task.slot, b, task.kv_head, keys, block_tiles),
                             call.grad_mask.prefetch(block, block_tiles)};
      RowPrefetch next[3];
      const bool same_task = j + 1 < part.end;
      const KeyHead here{task.slot, b, task.kv_head};
      const KeyHead* const head = same_task ? &here : next_head;
      if (head != nullptr) {
        const KeyBlock ahead = blocks.key_block(same_task ? j + 1 : 0);
        next[0] = call.keys.prefetch(false, *head, ahead, block_tiles);
        next[1] = call.values.prefetch(false, *head, ahead, block_tiles);
      }
      next[2] = prefetch_mask(larger_mask(p), b, h, q.position + (same_task ? 0 : q.count), q.count,
                              blocks.key_block(same_task ? j + 1 : part.begin), block_tiles);
      for (int g = 0; g < groups; ++g) {
        const int64_t begin = q.vectors * g / groups, lane = begin * VW;
        with_constant<kScoreVectors>(q.vectors * (g + 1) / groups - begin, [&](auto vectors) {
          constexpr int NR = static_cast<int>(vectors);
          vf best[NR];
          MMK_UNROLL for (int v = 0; v < NR; ++v) best[v] = zero();
          const auto between_tiles = [&] {
            for (RowPrefetch& x : next) x.step<false>();
            for (RowPrefetch& x : sums) x.step<true>();
            next_query.step<false>();
            next_grad.step<false>();
            next_out.step<false>();
            next_dq.step<true>();
          };
          with_bool(masks_at_once, [&](auto masks) {
            multiply_scores<kPairs, masks, NR, kQueryBlock>(key_rows, block.keys, tile.query_lanes + lane,
                                                            units<kPairs>(p.head_dim), tile.scores + lane, best,
                                                            {p.scale, mask.entries + lane}, between_tiles);
          });
          if (finish && !masks_at_once) {
            finish_scores<NR, kQueryBlock>(p, call.steps, block, window, mask, lane, tile.scores + lane,
                                           p.softcap > 0.f ? tile.capped + lane : nullptr, best);
          }
          const auto probabilities =
              finish ? make_probabilities<kPairs, true, NR> : make_probabilities<kPairs, false, NR>;
          probabilities(tile, lane, block.keys, call.steps, block.bias, stats, p.dropout_p > 0.f);
          if (call.wants_ds(segment, keys.index))
            make_ds<kPairs, NR>(call, task, block, j, value_rows, lane, tile, stats);
        });
        if (!want_query) continue;
        const int64_t rows = min(q.count, q.vectors * (g + 1) / groups * VW) - lane;
        float* to = dq + lane * dq_stride;
        Epilogue e{p.scale, first ? nullptr : kOnes.values, to, dq_stride, nullptr, to, dq_stride};
        if (finishes_dq) {
          const Rows& result = segment.grad_query;
          e.to = row_address(result, p.dtype, b, h, q.first + lane);
          e.to_stride = result.row, e.to_dtype = p.dtype;
        }
        multiply_features(kPairs, (kPairs ? tile.ds_key_pairs : tile.ds) + lane, 1, kQueryBlock, rows, key_columns,
                          units<kPairs>(block.keys), p.head_dim, e);
      }
      first = false;
      finished_dq = finishes_dq;
    }
    const MaskGradientSum::Place place{b, h, task.t, task.part, j};
    if (call.grad_mask.wanted() && !call.grad_mask.same_for_all_keys()) {
      call.grad_mask.wait(place);
      if (block.keys > 0 && call.grad_mask.same_for_all_queries())
        call.grad_mask.add_per_key(block, tile.mask_key_sums);
      call.grad_mask.end(place);
    }
    add_key_gradients<kPairs>(call, task, keys, block, j, query_columns, grad_columns, q.count, tile);
  }
  if (call.grad_mask.wanted() && call.grad_mask.same_for_all_keys()) {
    const MaskGradientSum::Place place{b, h, task.t, task.part, 0};
    call.grad_mask.wait(place);
    if (task.part == 0) {
      alignas(64) float rows[kQueryBlock];
      for (int64_t i = 0; i < q.count; ++i) {
        rows[i] = stats.grad_log_sum[i];
        if (p.sinks != nullptr) rows[i] -= stats.sink_gradient(call.steps, p.sinks[h], i);
      }
      call.grad_mask.add_rows({b, h, task.kv_head, nullptr, 0, 0, 0, q.position, q.count}, rows);
    }
    call.grad_mask.end(place);
  }
  if (bias_sums != nullptr) finish_bias_sums(p, tile, stats, q.vectors * VW, bias_sums);
  if (!want_query || finished_dq) return;
  if (first) std::memset(dq, 0, sizeof(float) * static_cast<size_t>(q.count * dq_stride));
  if (partial_dq != nullptr) return;
  store_rows({row_address(segment.grad_query, p.dtype, b, h, q.first), p.dtype, segment.grad_query.row, p.head_dim}, dq,
             dq_stride, q.count, nullptr);
}

// dQ of a block from its parts, in order.
void merge_query_gradient(const BackwardCall& call, const QueryBlock& q, int64_t b, int64_t h, float* partials,
                          int64_t size) {
  const AttentionParams& p = call.p;
  const int64_t stride = round_up(p.head_dim, VW);
  for (int64_t c = 1; c < call.parts; ++c) {
    for (int64_t x = 0; x < q.count * stride; x += VW)
      store(partials + x, load(partials + x) + load(partials + c * size + x));
  }
  const Rows& rows = q.segment->grad_query;
  store_rows({row_address(rows, p.dtype, b, h, q.first), p.dtype, rows.row, p.head_dim}, partials, stride, q.count,
             nullptr);
}

// The gradient of the segments' bias from the shares [tasks][key segments], in the order of the tasks.
inline void add_bias_gradient(const BackwardCall& call, const TaskGrid& grid, const float* shares) {
  const AttentionParams& p = call.p;
  const int64_t group = p.heads / p.kv_heads, pairs = p.query_segments * p.key_segments;
  const int64_t entries = p.bias.head == 0 ? pairs : p.heads * pairs;
  const Scratch scratch(2 * entries);
  auto* const totals = reinterpret_cast<double*>(scratch.data());
  for (int64_t i = 0; i < entries; ++i) totals[i] = 0.;
  const int64_t tasks = grid.tasks(p.batch * p.kv_heads);
  for (int64_t x = 0; x < tasks; ++x, shares += p.key_segments) {
    const TaskGrid::Place place = grid.place(x);
    const BackwardBlocks blocks(p, place.b);
    const int64_t h = place.kv_head * group + place.task / blocks.query_blocks;
    double* const to = totals + bias_at(p, h, blocks.query_block(place.task % blocks.query_blocks).segment, p.keys);
    for (int s = 0; s < p.key_segments; ++s) to[s] += static_cast<double>(shares[s]);
  }
  for (int64_t i = 0; i < entries; ++i) p.bias.grad[i] = static_cast<float>(totals[i]);
}

// The gradient of the sinks from the shares [tasks], in their order.
inline void add_sink_gradient(const BackwardCall& call, const TaskGrid& grid, const float* shares) {
  const AttentionParams& p = call.p;
  const Scratch scratch(2 * p.heads);
  auto* const totals = reinterpret_cast<double*>(scratch.data());
  for (int64_t h = 0; h < p.heads; ++h) totals[h] = 0.;
  const int64_t tasks = grid.tasks(p.batch * p.kv_heads), group = p.heads / p.kv_heads;
  for (int64_t x = 0; x < tasks; ++x) {
    const TaskGrid::Place place = grid.place(x);
    const int64_t blocks = BackwardBlocks(p, place.b).query_blocks;
    totals[place.kv_head * group + place.task / call.parts / blocks] += static_cast<double>(shares[x]);
  }
  for (int64_t h = 0; h < p.heads; ++h) p.grad_sinks[h] = static_cast<float>(totals[h]);
}

template <bool kPairs>
void backward(const AttentionParams& p) {
  BackwardCall call(p);
  call.keys.plan<kPairs>(p, false, true, call.want_query);
  call.values.plan<kPairs>(p, true, true, false);
  call.grad_key.plan(p, false);
  call.grad_value.plan(p, true);
  call.sinks_alone = call.wants_sinks_alone();
  const int64_t packed = call.keys.floats_per_head() + call.values.floats_per_head();
  const int64_t per_head = packed + call.grad_key.floats_per_head() + call.grad_value.floats_per_head();
  const int64_t wave = heads_per_wave(p, per_head), group = p.heads / p.kv_heads;
  const int64_t key_blocks = call.longest.key_blocks, partial_size = kQueryBlock * round_up(p.head_dim, VW);
  if (call.longest.query_blocks == 0) return;
  const TaskGrid grid(p, call.parts, p.queries[0].starts != nullptr,
                      [&](int64_t b) { return BackwardBlocks(p, b).query_blocks; });

  Carver count(nullptr);
  BackwardTile::carve<kPairs>(p, count);
  const int64_t tile_size = round_up(count.used(), 1024);
  const bool in_parts = call.parts > 1 && call.want_query;
  const int64_t partials = in_parts ? wave * group * call.longest.query_blocks * call.parts : 0;
  const Scratch scratch(p.workers.count * tile_size + wave * per_head + partials * partial_size);
  const Scratch shares(p.bias.grad == nullptr ? 0 : grid.tasks(p.batch * p.kv_heads) * p.key_segments);
  const Scratch sink_shares(p.grad_sinks == nullptr ? 0 : grid.tasks(p.batch * p.kv_heads));
  const Scratch counters(wave * key_blocks * 2 + call.grad_mask.turns());
  float* memory = scratch.data() + p.workers.count * tile_size;
  call.keys.use(memory);
  call.values.use(memory += wave * call.keys.floats_per_head());
  call.grad_key.use(memory += wave * call.values.floats_per_head());
  call.grad_value.use(memory += wave * call.grad_key.floats_per_head());
  float* const partial_memory = memory + wave * call.grad_value.floats_per_head();
  auto* const mask_turns = reinterpret_cast<int32_t*>(counters.data());
  call.turns = mask_turns + call.grad_mask.turns();
  call.started = reinterpret_cast<uint8_t*>(call.turns + wave * key_blocks);
  call.grad_mask.use(mask_turns);
  if (call.grad_mask.turns() > 0)
    std::memset(mask_turns, 0, sizeof(int32_t) * static_cast<size_t>(call.grad_mask.turns()));

  for (int64_t begin = 0; begin < p.batch * p.kv_heads; begin += wave) {
    const int64_t heads = min(wave, p.batch * p.kv_heads - begin);
    const int64_t before = grid.tasks(begin), tasks = grid.tasks(begin + heads) - before;
    if (packed > 0 && !call.sinks_alone) pack_wave<BackwardBlocks>(p, begin, heads, call.keys, call.values);
    if (key_blocks > 0) std::memset(call.turns, 0, static_cast<size_t>(wave * key_blocks * 5));
    // A worker takes a whole head while there are plenty, so that dK and dV stay in its cache.
    const int64_t grain = heads >= 4 * p.workers.count ? max(1, tasks / heads) : 1;
    for_each_claim(p.workers, tasks, grain, [&](int worker, int64_t first, int64_t last) {
      Carver carver(scratch.data() + worker * tile_size);
      const BackwardTile tile = BackwardTile::carve<kPairs>(p, carver);
      for (int64_t x = first; x < last; ++x) {
        const TaskGrid::Place place = grid.place(before + x);
        const BackwardBlocks blocks(p, place.b);
        const int64_t head = place.b * p.kv_heads + place.kv_head, of_head = place.task / call.parts;
        const Task task{place.b,
                        place.kv_head * group + of_head / blocks.query_blocks,
                        place.kv_head,
                        head - begin,
                        of_head % blocks.query_blocks,
                        place.task % call.parts,
                        static_cast<int32_t>(of_head),
                        of_head == group * blocks.query_blocks - 1};
        const int64_t following = before + x + 1 < grid.tasks(head + 1) ? head : head + 1;
        const KeyHead next{following - begin, following / p.kv_heads, following % p.kv_heads};
        const bool meets_keys = following < begin + heads && (following != head || blocks.key_blocks > 1);
        backward_task<kPairs>(call, blocks, task, meets_keys ? &next : nullptr, tile,
                              in_parts ? partial_memory + x * partial_size : nullptr,
                              p.bias.grad == nullptr ? nullptr : shares.data() + (before + x) * p.key_segments,
                              p.grad_sinks == nullptr ? nullptr : sink_shares.data() + before + x);
      }
    });
    if (!in_parts) continue;
    for_each_claim(p.workers, tasks / call.parts, 1, [&](int, int64_t first, int64_t last) {
      for (int64_t x = first; x < last; ++x) {
        const TaskGrid::Place place = grid.place(before + x * call.parts);
        const BackwardBlocks blocks(p, place.b);
        const int64_t block = place.task / call.parts;
        merge_query_gradient(call, blocks.query_block(block % blocks.query_blocks), place.b,
                             place.kv_head * group + block / blocks.query_blocks,
                             partial_memory + x * call.parts * partial_size, partial_size);
      }
    });
  }
  if (p.bias.grad != nullptr) add_bias_gradient(call, grid, shares.data());
  if (p.grad_sinks != nullptr) add_sink_gradient(call, grid, sink_shares.data());
}

}  // namespace

void attention_backward(const AttentionParams& p) {
  with_pairs(p.dtype, p.workers.tiles, is_worth_tiles(p), [&](auto pairs) { backward<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk

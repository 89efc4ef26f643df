//
//   The forward for few queries a head (decoding): O = softmax(mask(scale · q Kᵀ)) V, bound by reading K and V once.
//
// Tiling     a task owns up to kRows query rows that share a key head (queries of the heads of its group included) and
//            a part of the keys, of which it scores a run, weighs it and adds it up. Rows of K are multiplied as they
//            lie by q, the features in the lanes, VW sums finished together; then rows of V are added up with the
//            weights. Nothing is packed, every row is read once and in order.
// Threads    the keys are cut into parts whose number depends on the shape alone, merged in order.
// Precision  float32, bfloat16 and float16 being converted as they are loaded; or bfloat16 products accumulated in
//            float32 where the instruction exists (weights are then rounded to bfloat16).
// Limits     no dropout, no row_max and log_sum (a backward wants its scores summed in the order of the tiled forward).
#include "csrc/attention/partial.h"
#include "csrc/attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kRows = 4, kKeys = 128;  // a part of the keys is a whole number of blocks of kKeys
constexpr int64_t kRun = 1024;         // blocks are worked on in runs of up to as many keys
constexpr int64_t kScoreStride = kRun + 2 * VW;
using KeyBlocks = Blocks<1, kKeys>;

struct FewQueriesTile {
  float *query, *scores;      // [rows][features or pairs], [rows][kScoreStride]
  float *mask, *second_mask;  // [kRun]
  float* total;               // [rows][features]

  static FewQueriesTile carve(const AttentionParams& p, Carver& memory) {
    return {memory.take(kRows * round_up(p.head_dim, VW)), memory.take(kRows * kScoreStride),
            memory.take(p.mask.data != nullptr ? kRun + VW : 0),
            memory.take(p.second_mask.data != nullptr ? kRun + VW : 0), memory.take(kRows * round_up(p.value_dim, VW))};
  }
};

// One query row: which head and position, and where its result goes.
struct QueryRow {
  const QuerySegment* segment;
  int64_t h, in_segment, position;
};

QueryRow query_row(const AttentionParams& p, int64_t kv_head, int64_t queries, int64_t row) {
  const int64_t position = row % queries;
  int64_t l = position;
  const QuerySegment* s = p.queries;
  for (; l >= s->length; ++s) l -= s->length;
  return {s, kv_head * (p.heads / p.kv_heads) + row / queries, l, position};
}

// Rows of K or V of one head.
template <class T>
struct StreamedRows {
  const T* data;
  int64_t stride, features;
};

// Fetches into the level-2 cache what lies a little behind `at`. How far pays was measured (Zen 4, keys in DRAM); one
// query on pairs is as fast as hardware alone brings its rows.
template <bool kPairs, int NQ, class T>
MMK_INLINE void fetch_behind(const T* at) {
  constexpr int64_t kAhead = NQ > 1 ? 16 << 10 : kPairs ? 0 : 4 << 10;  // bytes
  if constexpr (kAhead > 0) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead, 0, 2);
}

// VW units (floats, or pairs of bfloat16) from feature c on, and of fewer features zeros behind them.
template <bool kPairs, class T>
MMK_INLINE vf load_units(const T* row, int64_t c) {
  if constexpr (kPairs) {
    return load_pairs(&row[c].bits);
  } else {
    return load_as_float(row + c);
  }
}
template <bool kPairs, class T>
MMK_INLINE vf load_units(const T* row, int64_t c, int64_t features) {
  if constexpr (kPairs) {
    return load_pairs(&row[c].bits, features - c);
  } else {
    return load_as_float(row + c, features - c);
  }
}

// Lane sums of one row · one query.
template <bool kPairs, class T>
MMK_INLINE vf dot_row(const StreamedRows<T>& key, const T* row, const float* query) {
  constexpr int64_t kChunk = kPairs ? 2 * VW : VW;
  vf acc = zero();
  int64_t c = 0;
  for (; c + kChunk <= key.features; c += kChunk, query += VW) {
    fetch_behind<kPairs, 1>(row + c);
    acc = multiply_add<kPairs>(acc, load_units<kPairs>(row, c), load(query));
  }
  return c < key.features ? multiply_add<kPairs>(acc, load_units<kPairs>(row, c, key.features), load(query)) : acc;
}

// acc[x · kStep + y] += lane sums of row y · query x, from feature c on.
template <bool kPairs, bool kWhole, int kStep, int NQ, class T>
MMK_INLINE void dot_chunk(vf (&acc)[VW], const StreamedRows<T>& key, const T* const (&rows)[kStep], int64_t c,
                          const float* query, int64_t query_stride) {
  vf q[NQ];
  MMK_UNROLL for (int x = 0; x < NQ; ++x) q[x] = load(query + x * query_stride);
  MMK_UNROLL for (int y = 0; y < kStep; ++y) {
    fetch_behind<kPairs, NQ>(rows[y] + c);
    const vf k = kWhole ? load_units<kPairs>(rows[y], c) : load_units<kPairs>(rows[y], c, key.features);
    MMK_UNROLL for (int x = 0; x < NQ; ++x) acc[x * kStep + y] = multiply_add<kPairs>(acc[x * kStep + y], k, q[x]);
  }
}

// scores[x][0 … keys - 1] = q[x] · K[i]
template <bool kPairs, int NQ, class T>
MMK_NOINLINE void dot_rows(const StreamedRows<T>& key, int64_t keys, const float* query, int64_t query_stride,
                           float* scores) {
  constexpr int kSlots = NQ == 3 ? 4 : NQ, kStep = VW / kSlots;  // kStep keys × NQ queries: VW sums
  constexpr int64_t kChunk = kPairs ? 2 * VW : VW;
  for (int64_t i = 0; i < keys; i += kStep) {
    const T* rows[kStep];
    MMK_UNROLL for (int y = 0; y < kStep; ++y) rows[y] = key.data + min(i + y, keys - 1) * key.stride;
    vf acc[VW];
    if constexpr (NQ == 1) {
      MMK_UNROLL for (int y = 0; y < kStep; ++y) acc[y] = dot_row<kPairs>(key, rows[y], query);
    } else {
      MMK_UNROLL for (int y = 0; y < VW; ++y) acc[y] = zero();
      const float* q = query;
      int64_t c = 0;
      for (; c + kChunk <= key.features; c += kChunk, q += VW) {
        dot_chunk<kPairs, true, kStep, NQ>(acc, key, rows, c, q, query_stride);
      }
      if (c < key.features) dot_chunk<kPairs, false, kStep, NQ>(acc, key, rows, c, q, query_stride);
    }
    alignas(64) float sums[VW];
    store(sums, sum_rows(acc));
    MMK_UNROLL for (int x = 0; x < NQ; ++x)
        std::memcpy(scores + x * kScoreStride + i, sums + x * kStep, sizeof(float) * kStep);
  }
}

// total[x][c …] = factor[x] · total[x][c …] + Σ_i weight[x][i] V[i, c …] for NV vectors of features; with kPairs a
// weight is that of two keys.
template <bool kPairs, bool kWhole, int NQ, int NV, class T>
MMK_INLINE void add_columns(const StreamedRows<T>& value, int64_t keys, const float* weights, const float* factor,
                            int64_t c, float* total, int64_t total_stride) {
  vf acc[NQ][NV];
  clear(acc);
  const T* row = value.data;
  if constexpr (kPairs) {
    for (int64_t i = 0; i < keys; i += 2) {
      const T* const odd = row + value.stride;
      MMK_UNROLL for (int j = 0; j < NV; j += 2) {
        const int64_t at = c + j * VW;
        fetch_behind<kPairs, NQ>(row + at);
        fetch_behind<kPairs, NQ>(odd + at);
        const vf x = kWhole ? load_units<true>(row, at) : load_units<true>(row, at, value.features);
        const vf y = i + 1 == keys ? zero()
                     : kWhole      ? load_units<true>(odd, at)
                                   : load_units<true>(odd, at, value.features);
        vf first, second;
        pair_rows(x, y, first, second);
        MMK_UNROLL for (int q = 0; q < NQ; ++q) {
          const vf weight = set1(weights[q * kScoreStride + i / 2]);
          acc[q][j] = pair_dot(acc[q][j], weight, first);
          if (j + 1 < NV) acc[q][j + 1] = pair_dot(acc[q][j + 1], weight, second);
        }
      }
      row = odd + value.stride;
    }
  } else {
    for (int64_t i = 0; i < keys; ++i, row += value.stride) {
      MMK_UNROLL for (int j = 0; j < NV; ++j) {
        const int64_t at = c + j * VW;
        fetch_behind<kPairs, NQ>(row + at);
        const vf x = kWhole ? load_units<false>(row, at) : load_units<false>(row, at, value.features);
        MMK_UNROLL for (int q = 0; q < NQ; ++q) acc[q][j] = fma(set1(weights[q * kScoreStride + i]), x, acc[q][j]);
      }
    }
  }
  MMK_UNROLL for (int x = 0; x < NQ; ++x) {
    MMK_UNROLL for (int j = 0; j < NV; ++j) {
      float* to = total + x * total_stride + c + j * VW;
      store(to, fma(load(to), set1(factor[x]), acc[x][j]));
    }
  }
}

// add_columns from feature c to the last one, NV vectors at a time and the rest in halves of that.
template <bool kPairs, int NQ, int NV, class T>
MMK_INLINE void add_column_blocks(const StreamedRows<T>& value, int64_t keys, const float* weights, const float* factor,
                                  int64_t c, float* total, int64_t total_stride) {
  constexpr bool kLast = NV == (kPairs ? 2 : 1);
  for (; c + NV * VW <= value.features; c += NV * VW) {
    add_columns<kPairs, true, NQ, NV>(value, keys, weights, factor, c, total, total_stride);
  }
  if (c >= value.features) return;
  if constexpr (!kLast) {
    add_column_blocks<kPairs, NQ, NV / 2>(value, keys, weights, factor, c, total, total_stride);
  } else if (kPairs && c + VW < value.features) {
    add_columns<kPairs, false, NQ, NV>(value, keys, weights, factor, c, total, total_stride);
  } else {
    add_columns<kPairs, false, NQ, 1>(value, keys, weights, factor, c, total, total_stride);
  }
}

// total[x][:] = factor[x] · total[x][:] + Σ_i weight[x][i] V[i, :]
template <bool kPairs, int NQ, class T>
MMK_NOINLINE void add_rows(StreamedRows<T> value, int64_t keys, const float* weights, const float* factor, float* total,
                           int64_t total_stride) {
  constexpr int kVectors = (kRegisters == 32 ? 16 : 8) / (NQ == 3 ? 4 : NQ);
  const int64_t vectors = ceil_div(value.features, VW);
  // Rows too long for the registers are read in several columns: few rows at a time then, that stay in cache.
  constexpr int64_t kNear = 16 << 10;
  const int64_t row_bytes = max(1, value.features * static_cast<int64_t>(sizeof(T)));
  const int64_t step = vectors <= kVectors ? keys : min(keys, max(8, round_up(kNear / row_bytes, 2)));
  for (int64_t i = 0; i < keys; i += step) {
    const int64_t count = min(step, keys - i);
    const float* const w = weights + (kPairs ? i / 2 : i);
    add_column_blocks<kPairs, NQ, kVectors>(value, count, w, factor, 0, total, total_stride);
    value.data += count * value.stride;
    factor = kOnes.values;
  }
}

// Turns the scores of a row into weights exp(s - row_max), in place, with kPairs as bfloat16 and in pairs that end with
// a weight of 0; returns their sum. row_max goes up as it must,
// `factor` is what older weights must be multiplied by.
template <bool kPairs>
float weigh(const AttentionParams& p, const ScoreSteps& steps, const ScoreBlock& block, Range allowed, float bias,
            const float* mask, float* scores, float& row_max, float& factor) {
  const int64_t keys = block.keys;
  const vf scale = set1(steps.scale_first ? p.scale : 1.f);
  const vf cap = set1(p.softcap);
  const uint8_t* poisoned = block.segment->poisoned;
  if (poisoned != nullptr) {
    poisoned += number_at(p, *block.segment, p.kv_heads, block.b, block.kv_head, block.key_in_segment);
    for (int64_t i = 0; i < keys; ++i) scores[i] = poisoned[i] != 0 ? NAN : scores[i];
  }
  vf best = set1(-kInfinity);
  for (int64_t i = 0; i < round_up(keys, VW); i += VW) {
    vf s = load(scores + i) * scale;
    if (steps.softcap) s = cap * tanh(s / cap);
    if (mask != nullptr) {
      const vf entry = load(mask + i);
      s = select(entry == set1(-kInfinity), entry, s + entry);
    }
    if (steps.scale_first) s = s + set1(bias);
    alignas(64) float lanes[VW];
    store(lanes, s);
    if (i < allowed.begin || i + VW > allowed.end) {
      for (int y = 0; y < VW; ++y) {
        if (i + y < allowed.begin || i + y >= allowed.end) lanes[y] = -kInfinity;
      }
    }
    s = load(lanes);
    best = max(best, s);
    store(scores + i, steps.scale_first ? exponent_or_hidden(s) : s);
  }
  bias = steps.late_bias(bias);
  const float block_max = max_lane(fma(best, set1(steps.score_scale), set1(bias)));
  const float raised = !(block_max <= row_max) ? block_max : row_max;
  const float shift = exponent_shift(raised);
  factor = factor_of_older(row_max, raised);
  row_max = raised;
  vf minus_shift[1] = {bias_less_shift(bias, set1(shift))}, exponent_scale = set1(steps.exponent_scale);
  if (!steps.scale_first && is_huge(raised)) {
    float tops[VW];
    store(tops, set1(raised));
    make_huge_exponents<1, VW>(steps, bias, tops, minus_shift, round_up(keys, VW) / VW, scores);
    exponent_scale = set1(1.f);
    minus_shift[0] = zero();
  }
  vf sums = zero();
  for (int64_t i = 0; i < round_up(keys, VW); i += VW) {
    const vf w = exp2<kPairs ? 3 : 5>(fma(load(scores + i), exponent_scale, minus_shift[0]));
    if constexpr (kPairs) {
      store_bf16(reinterpret_cast<uint16_t*>(scores) + i, w);
    } else {
      store(scores + i, w);
    }
    sums = sums + w;
  }
  return sum(sums);
}

// tile.mask[keys] of a row, with both masks in it.
inline void load_row_of_masks(const AttentionParams& p, int64_t b, const QueryRow& row, const ScoreBlock& block,
                              const FewQueriesTile& tile) {
  const auto load_row = [&](const AttentionMask& m, float* entries) {
    const int64_t at = b * m.batch + row.h * m.head + row.position * m.query + block.key * m.key;
    load_mask_strided(m, at, m.key, block.keys, entries);
  };
  load_row(p.mask, tile.mask);
  if (p.second_mask.data == nullptr) return;
  load_row(p.second_mask, tile.second_mask);
  for (int64_t i = 0; i < block.keys; i += VW)
    store(tile.mask + i, joined_entry(load(tile.mask + i), load(tile.second_mask + i)));
}

template <bool kPairs, int NQ>
void few_queries_task(const AttentionParams& p, const ScoreSteps& steps, const KeyBlocks& blocks, int64_t b,
                      int64_t kv_head, const QueryRow* rows, Range part, bool first_part, const FewQueriesTile& tile,
                      const Partial& out) {
  const int64_t query_stride = round_up(p.head_dim, VW), stride = round_up(p.value_dim, VW);
  const Window window(p, b, blocks.queries, blocks.keys);
  Range any{INT64_MAX, 0};
  for (int x = 0; x < NQ; ++x) {
    const void* from = row_address(rows[x].segment->query, p.dtype, b, rows[x].h, rows[x].in_segment);
    float* const to = tile.query + x * query_stride;
    if constexpr (kPairs) {
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(query_stride));
      pack_rows_as_pairs(static_cast<const uint16_t*>(from), 0, 1, p.head_dim, to, query_stride);
    } else {
      pack_rows_as_float(p.dtype, from, 0, 1, p.head_dim, to, query_stride);
    }
    any = {min(any.begin, window.begin(rows[x].position)), max(any.end, window.end(rows[x].position))};
    const SoftmaxStart start(p, steps, rows[x].h, first_part);
    out.row_max[x] = start.row_max;
    out.sum[x] = start.sum;
  }
  std::memset(out.total, 0, sizeof(float) * static_cast<size_t>(NQ * stride));

  for (int64_t j = part.begin; j < part.end;) {
    KeyBlock keys = blocks.key_block(j);
    while (++j < part.end && keys.count + kKeys <= kRun) {
      const KeyBlock next = blocks.key_block(j);
      if (next.segment != keys.segment) break;
      keys.count += next.count;
    }
    ScoreBlock block = score_block<false>(p, keys, any, {}, b, 0);
    if (block.keys == 0) continue;
    block.kv_head = kv_head;
    const auto streamed = [&](const Rows& source, int64_t features, auto f) {
      with_element_type(p.dtype, row_address(source, p.dtype, b, kv_head, block.key_in_segment), [&](const auto* from) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
        if constexpr (!kPairs || std::is_same_v<T, Bf16>) f(StreamedRows<T>{from, source.row, features});
      });
    };
    streamed(keys.segment->key, p.head_dim,
             [&](const auto& from) { dot_rows<kPairs, NQ>(from, block.keys, tile.query, query_stride, tile.scores); });
    float factor[NQ];
    for (int x = 0; x < NQ; ++x) {
      float* mask = nullptr;
      if (p.mask.data != nullptr) {
        mask = tile.mask;
        load_row_of_masks(p, b, rows[x], block, tile);
      }
      const int64_t end = window.end(rows[x].position);
      Range allowed{window.begin(rows[x].position) - block.key, min(block.keys, end - min(end, block.key))};
      float bias = bias_of(p, rows[x].h, rows[x].segment, block.segment);
      if (bias == -kInfinity) bias = 0.f, allowed = {0, 0};
      const float weights = weigh<kPairs>(p, steps, block, allowed, bias, mask, tile.scores + x * kScoreStride,
                                          out.row_max[x], factor[x]);
      out.sum[x] = out.sum[x] * factor[x] + weights;
    }
    streamed(keys.segment->value, p.value_dim,
             [&](const auto& from) { add_rows<kPairs, NQ>(from, block.keys, tile.scores, factor, out.total, stride); });
  }
}

template <bool kPairs>
void few_queries(const AttentionParams& p) {
  const ScoreSteps steps(p);
  const KeyBlocks longest(p);
  const int64_t queries = longest.queries, rows = queries * (p.heads / p.kv_heads), groups = ceil_div(rows, kRows);
  const int64_t heads = p.batch * p.kv_heads, stride = round_up(p.value_dim, VW);
  if (rows == 0) return;
  const int64_t parts = key_parts(heads * groups, longest.key_blocks, 2);
  Carver count(nullptr);
  FewQueriesTile::carve(p, count);
  const int64_t tile_size = round_up(count.used(), 16), partial_size = round_up(Partial::floats(kRows, stride), 16);
  const Scratch scratch(p.workers.count * tile_size + heads * groups * parts * partial_size);
  float* const partials = scratch.data() + p.workers.count * tile_size;

  for_each_claim(p.workers, heads * groups * parts, 1, [&](int worker, int64_t first, int64_t last) {
    Carver memory(scratch.data() + worker * tile_size);
    const FewQueriesTile tile = FewQueriesTile::carve(p, memory);
    for (int64_t task = first; task < last; ++task) {
      const int64_t part = task % parts, group = task / parts % groups, head = task / parts / groups;
      QueryRow here[kRows] = {};
      const int64_t n = min(kRows, rows - group * kRows);
      for (int64_t x = 0; x < n; ++x) here[x] = query_row(p, head % p.kv_heads, queries, group * kRows + x);
      const KeyBlocks blocks(p, head / p.kv_heads);
      const Range range{blocks.key_blocks * part / parts, blocks.key_blocks * (part + 1) / parts};
      with_constant<kRows>(n, [&](auto nq) {
        few_queries_task<kPairs, static_cast<int>(nq)>(p, steps, blocks, head / p.kv_heads, head % p.kv_heads, here,
                                                       range, part == 0, tile,
                                                       Partial::at(partials + task * partial_size, kRows, stride));
      });
    }
  });
  for_each_claim(p.workers, heads * groups, 64, [&](int worker, int64_t first, int64_t last) {
    Carver memory(scratch.data() + worker * tile_size);
    const FewQueriesTile tile = FewQueriesTile::carve(p, memory);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / groups, begin = task % groups * kRows, n = min(kRows, rows - begin);
      Partial all[kMaxParts];
      for (int64_t c = 0; c < parts; ++c)
        all[c] = Partial::at(partials + (task * parts + c) * partial_size, kRows, stride);
      float row_max[kRows], sum[kRows], inverse[kRows];
      Partial merged{tile.total, row_max, sum};
      if (parts == 1) {
        merged = all[0];
      } else {
        merge_partials(all, parts, n, stride, merged);
      }
      invert_sums(merged.sum, n, inverse);
      for (int64_t x = 0; x < n; ++x) {
        const QueryRow row = query_row(p, head % p.kv_heads, queries, begin + x);
        const Rows& out = row.segment->out;
        store_rows({row_address(out, p.dtype, head / p.kv_heads, row.h, row.in_segment), p.dtype, 0, p.value_dim},
                   merged.total + x * stride, stride, 1, inverse + x);
      }
    }
  });
}

}  // namespace

void attention_few_queries(const AttentionParams& p) {
  with_pairs(p.dtype, p.workers.tiles, false, [&](auto pairs) { few_queries<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk

//
//   The forward for few queries a head (decoding): O = softmax(mask(scale · q Kᵀ)) V, bound by reading K and V once.
//
// Tiling     a task owns up to kRows query rows that share a key head (queries of the heads of its group included) and
// a
//            part of the keys. Rows of K are multiplied as they lie by q, the features in the lanes, VW sums finished
//            together; then rows of V are added up with the weights. Nothing is packed; blocks of kKeys keys.
// Threads    the keys are cut into parts whose number depends on the shape alone, merged in order.
// Precision  float32; bfloat16 and float16 are converted as they are loaded.
// Limits     no dropout, no row_max and log_sum (a backward wants its scores summed in the order of the tiled forward).
#include "csrc/attention/partial.h"
#include "csrc/attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kRows = 4, kKeys = 128;
using KeyBlocks = Blocks<1, kKeys>;

struct FewQueriesTile {
  float *query, *scores, *mask, *total;  // [rows][features], [rows][kKeys], [kKeys], [rows][features]

  static FewQueriesTile carve(const AttentionParams& p, Carver& memory) {
    return {memory.take(kRows * round_up(p.head_dim, VW)), memory.take(kRows * (kKeys + VW)), memory.take(kKeys + VW),
            memory.take(kRows * round_up(p.value_dim, VW))};
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

// scores[x][0 … keys - 1] = q[x] · K[i]
template <int NQ, class T>
MMK_NOINLINE void dot_rows(const T* key, int64_t stride, int64_t keys, const float* query, int64_t query_stride,
                           int64_t features, float* scores, RowPrefetch ahead) {
  constexpr int kSlots = NQ == 3 ? 4 : NQ, kStep = VW / kSlots;  // kStep keys × NQ queries: VW sums
  for (int64_t i = 0; i < keys; i += kStep) {
    ahead.step<false>();
    const T* rows[kStep];
    MMK_UNROLL for (int y = 0; y < kStep; ++y) rows[y] = key + min(i + y, keys - 1) * stride;
    vf acc[VW];
    MMK_UNROLL for (int y = 0; y < VW; ++y) acc[y] = zero();
    int64_t c = 0;
    for (; c + VW <= features; c += VW) {
      vf q[NQ];
      MMK_UNROLL for (int x = 0; x < NQ; ++x) q[x] = load(query + x * query_stride + c);
      MMK_UNROLL for (int y = 0; y < kStep; ++y) {
        const vf k = load_as_float(rows[y] + c);
        MMK_UNROLL for (int x = 0; x < NQ; ++x) acc[x * kStep + y] = fma(k, q[x], acc[x * kStep + y]);
      }
    }
    if (c < features) {
      for (int y = 0; y < kStep; ++y) {
        const vf k = load_as_float(rows[y] + c, features - c);
        for (int x = 0; x < NQ; ++x)
          acc[x * kStep + y] = fma(k, load(query + x * query_stride + c), acc[x * kStep + y]);
      }
    }
    alignas(64) float sums[VW];
    store(sums, sum_rows(acc));
    MMK_UNROLL for (int x = 0; x < NQ; ++x)
        std::memcpy(scores + x * (kKeys + VW) + i, sums + x * kStep, sizeof(float) * kStep);
  }
}

// total[x][:] = factor[x] · total[x][:] + Σ_i weight[x][i] V[i, :]
template <int NQ, class T>
MMK_NOINLINE void add_rows(const T* value, int64_t stride, int64_t keys, const float* weights, const float* factor,
                           int64_t features, float* total, int64_t total_stride, RowPrefetch ahead) {
  constexpr int kVectors = (kRegisters == 32 ? 16 : 8) / (NQ == 3 ? 4 : NQ);
  const auto chunk = [&](auto width, int64_t v) {
    constexpr int NV = static_cast<int>(width);
    const int64_t c = v * VW;
    vf acc[NQ][NV];
    clear(acc);
    const bool whole = c + NV * VW <= features;
    for (int64_t i = 0; i < keys; ++i) {
      ahead.step<false>();
      const T* row = value + i * stride + c;
      MMK_UNROLL for (int j = 0; j < NV; ++j) {
        const vf x = whole ? load_as_float(row + j * VW) : load_as_float(row + j * VW, features - c - j * VW);
        MMK_UNROLL for (int q = 0; q < NQ; ++q) acc[q][j] = fma(set1(weights[q * (kKeys + VW) + i]), x, acc[q][j]);
      }
    }
    MMK_UNROLL for (int x = 0; x < NQ; ++x) {
      MMK_UNROLL for (int j = 0; j < NV; ++j) {
        float* to = total + x * total_stride + c + j * VW;
        store(to, fma(load(to), set1(factor[x]), acc[x][j]));
      }
    }
  };
  const int64_t vectors = ceil_div(features, VW);
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) chunk(Constant<kVectors>{}, v);
  for (; v < vectors; ++v) chunk(Constant<1>{}, v);
}

// Turns the scores of a row into weights exp(s - row_max), in place; returns their sum. row_max goes up as it must,
// `factor` is what older weights must be multiplied by.
inline float weigh(const AttentionParams& p, const ScoreSteps& steps, const ScoreBlock& block, Range allowed,
                   const float* mask, float* scores, float& row_max, float& factor) {
  const int64_t keys = block.keys;
  const vf scale = set1(steps.scale_first ? p.scale : 1.f);
  const vf cap = set1(p.softcap);
  const uint8_t* poisoned = block.segment->poisoned;
  if (poisoned != nullptr) {
    poisoned += (block.b * p.kv_heads + block.kv_head) * block.segment->length + block.key_in_segment;
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
  const float block_max = max_lane(best) * steps.score_scale;
  const float raised = !(block_max <= row_max) ? block_max : row_max;
  const float shift = exponent_shift(raised);
  factor = std::exp2(exponent_shift(row_max) - shift);
  row_max = raised;
  vf sums = zero();
  for (int64_t i = 0; i < round_up(keys, VW); i += VW) {
    const vf w = exp2<5>(fma(load(scores + i), set1(steps.exponent_scale), set1(-shift)));
    store(scores + i, w);
    sums = sums + w;
  }
  return sum(sums);
}

template <int NQ>
void few_queries_task(const AttentionParams& p, const ScoreSteps& steps, const KeyBlocks& blocks, int64_t b,
                      int64_t kv_head, const QueryRow* rows, Range part, const FewQueriesTile& tile,
                      const Partial& out) {
  const int64_t query_stride = round_up(p.head_dim, VW), stride = round_up(p.value_dim, VW);
  const int64_t queries = total_queries(p);
  const Window window(p, b, queries, blocks.keys);
  Range any{INT64_MAX, 0};
  for (int x = 0; x < NQ; ++x) {
    const void* from = row_address(rows[x].segment->query, p.dtype, b, rows[x].h, rows[x].in_segment);
    pack_rows_as_float(p.dtype, from, 0, 1, p.head_dim, tile.query + x * query_stride, query_stride);
    any = {min(any.begin, window.begin(rows[x].position)), max(any.end, window.end(rows[x].position))};
    out.row_max[x] = -FLT_MAX;
    out.sum[x] = 0.f;
  }
  std::memset(out.total, 0, sizeof(float) * static_cast<size_t>(NQ * stride));

  for (int64_t j = part.begin; j < part.end; ++j) {
    const KeyBlock keys = blocks.key_block(j);
    ScoreBlock block = score_block<false>(p, keys, any, {}, b, 0);
    if (block.keys == 0) continue;
    block.kv_head = kv_head;
    // While keys are multiplied their values are fetched, and while values are added up the next keys.
    const Rows &k = keys.segment->key, &v = keys.segment->value;
    const int64_t size = element_size(p.dtype), next = block.key_in_segment + block.keys;
    const RowPrefetch values(row_address(v, p.dtype, b, kv_head, block.key_in_segment), p.value_dim * size,
                             v.row * size, block.keys, block.keys * NQ / VW);
    const RowPrefetch next_keys(row_address(k, p.dtype, b, kv_head, next), p.head_dim * size, k.row * size,
                                min(kKeys, keys.segment->length - next), block.keys);
    with_element_type(p.dtype, row_address(k, p.dtype, b, kv_head, block.key_in_segment), [&](const auto* from) {
      dot_rows<NQ>(from, k.row, block.keys, tile.query, query_stride, p.head_dim, tile.scores, values);
    });
    float factor[NQ];
    for (int x = 0; x < NQ; ++x) {
      float* mask = nullptr;
      if (p.mask.data != nullptr) {
        mask = tile.mask;
        load_mask_strided(
            p.mask,
            b * p.mask.batch + rows[x].h * p.mask.head + rows[x].position * p.mask.query + block.key * p.mask.key,
            p.mask.key, block.keys, mask);
      }
      const int64_t end = window.end(rows[x].position);
      const Range allowed{window.begin(rows[x].position) - block.key, min(block.keys, end - min(end, block.key))};
      const float weights =
          weigh(p, steps, block, allowed, mask, tile.scores + x * (kKeys + VW), out.row_max[x], factor[x]);
      out.sum[x] = out.sum[x] * factor[x] + weights;
    }
    with_element_type(p.dtype, row_address(v, p.dtype, b, kv_head, block.key_in_segment), [&](const auto* from) {
      add_rows<NQ>(from, v.row, block.keys, tile.scores, factor, p.value_dim, out.total, stride, next_keys);
    });
  }
}

}  // namespace

void attention_few_queries(const AttentionParams& p) {
  const ScoreSteps steps(p);
  const KeyBlocks blocks(p);
  const int64_t queries = total_queries(p), rows = queries * (p.heads / p.kv_heads), groups = ceil_div(rows, kRows);
  const int64_t heads = p.batch * p.kv_heads, stride = round_up(p.value_dim, VW);
  if (rows == 0) return;
  const int64_t parts = key_parts(heads * groups, blocks.key_blocks, 2);
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
      const Range range{blocks.key_blocks * part / parts, blocks.key_blocks * (part + 1) / parts};
      with_constant<kRows>(n, [&](auto nq) {
        few_queries_task<static_cast<int>(nq)>(p, steps, blocks, head / p.kv_heads, head % p.kv_heads, here, range,
                                               tile, Partial::at(partials + task * partial_size, kRows, stride));
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

}  // namespace MMK_ISA
}  // namespace mmk

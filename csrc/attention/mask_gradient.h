// The gradient of a float mask, from blocks of dSᵀ [keys][lanes]: summed over what the mask broadcasts, in an order
// that does not depend on the workers.
#pragma once

#include "csrc/attention/scores.h"

namespace mmk {
namespace MMK_ISA {
namespace {

class MaskGradientSum {
 public:
  MaskGradientSum(const AttentionParams& p, int64_t query_blocks, int64_t key_blocks, int64_t parts)
      : g_(p.grad_mask), heads_(p.heads), query_blocks_(query_blocks), key_blocks_(key_blocks), parts_(parts) {
    const bool batches = g_.batch == 0 && p.batch > 1, heads = g_.head == 0 && p.heads > 1;
    shared_ = batches || heads || (g_.query == 0 && query_blocks > 1) || (g_.key == 0 && parts > 1);
    if (!wanted() || !shared_) return;
    slots_ = (g_.batch == 0 ? 1 : p.batch) * (g_.head == 0 ? 1 : heads_) * (g_.query == 0 ? 1 : query_blocks_) *
             (g_.key == 0 ? 1 : key_blocks_);
  }

  bool wanted() const { return g_.data != nullptr; }
  int64_t turns() const { return slots_; }
  void use(int32_t* turns) { turns_ = turns; }
  bool same_for_all_keys() const { return g_.key == 0; }
  bool same_for_all_queries() const { return g_.query == 0 && g_.key != 0; }

  // A task (b, h, query block t, part) and one of its key blocks j take their turn in the sums they share with others.
  struct Place {
    int64_t b, h, t, part, j;
  };
  void wait(const Place& x) const {
    if (shared_) wait_turn(turns_ + slot(x), rank(x));
  }
  void end(const Place& x) const {
    if (shared_) end_turn(turns_ + slot(x), rank(x));
  }

  // A mask with an entry for each query and key: adds dS of a group of lanes.
  void add_full(const ScoreBlock& block, const float* ds, int64_t stride, int64_t lane, int64_t lanes) const {
    const int64_t count = min(lanes, block.queries - lane);
    if (g_.key == 1) {
      with_element_type(g_.dtype, g_.data, [&](auto* p) {
        p += at(block, block.query + lane, block.key);
        with_bool(g_.zeroed,
                  [&](auto adds) { transpose_lanes<adds>(ds + lane, stride, count, block.keys, p, g_.query); });
      });
      return;
    }
    for (int64_t i = 0; i < count; i += VW) {
      for (int64_t k = 0; k < block.keys; k += VW) {
        const int64_t n = min(VW, block.keys - k);
        vf r[VW];
        MMK_UNROLL for (int x = 0; x < VW; ++x) r[x] = x < n ? load(ds + (k + x) * stride + lane + i) : zero();
        transpose(r);
        MMK_UNROLL for (int x = 0; x < VW; ++x) {
          if (i + x < count) add(at(block, block.query + lane + i + x, block.key + k), g_.key, r[x], n);
        }
      }
    }
  }
  // The same from dS as pairs of bfloat16 [keys / 2][lanes], for a mask that takes_pairs().
  bool takes_pairs() const { return wanted() && g_.dtype == Dtype::bf16 && g_.query != 0 && g_.key == 1 && !g_.zeroed; }
  void add_pairs(const ScoreBlock& block, const float* ds_pairs, int64_t stride, int64_t lane, int64_t lanes) const {
    const int64_t count = min(lanes, block.queries - lane);
    auto* const to = static_cast<uint16_t*>(g_.data) + at(block, block.query + lane, block.key);
    for (int64_t i = 0; i < count; i += VW) {
      for (int64_t k = 0; k < block.keys; k += 2 * VW) {
        vf r[VW];
        load_transposed(ds_pairs + k / 2 * stride + lane + i, stride, r);
        const auto bytes = static_cast<size_t>(2 * min(2 * VW, block.keys - k));
        uint16_t* const entries = to + i * g_.query + k;
        if (bytes == sizeof(vf) && i + VW <= count) {
          MMK_UNROLL for (int x = 0; x < VW; ++x) std::memcpy(entries + x * g_.query, &r[x], sizeof(vf));
        } else {
          for (int x = 0; x < VW && i + x < count; ++x) std::memcpy(entries + x * g_.query, &r[x], bytes);
        }
      }
    }
  }
  RowPrefetch prefetch(const ScoreBlock& block, int64_t steps) const {
    if (!wanted() || g_.query == 0 || g_.key != 1) return {};
    const int64_t size = element_size(g_.dtype);
    return {static_cast<const char*>(g_.data) + at(block, block.query, block.key) * size, block.keys * size,
            g_.query * size, block.queries, steps};
  }

  // A mask with an entry for each key, the sums over the queries of a block being `sums` [keys].
  void add_per_key(const ScoreBlock& block, const float* sums) const {
    for (int64_t k = 0; k < block.keys; k += VW) {
      const int64_t n = min(VW, block.keys - k);
      add(at(block, 0, block.key + k), g_.key, load_as_float(sums + k, n), n);
    }
  }
  // A mask that is the same for all keys shifts whole rows: their sums of dS are d log_sum, exactly, less the sink's.
  void add_rows(const ScoreBlock& block, const float* sums) const {
    if (g_.query != 0) {
      for (int64_t i = 0; i < block.queries; i += VW) {
        const int64_t n = min(VW, block.queries - i);
        add(at(block, block.query + i, 0), g_.query, load_as_float(sums + i, n), n);
      }
    } else {
      float total = 0.f;
      for (int64_t i = 0; i < block.queries; ++i) total += sums[i];
      add(at(block, 0, 0), 1, set1(total), 1);
    }
  }

 private:
  // dS [keys][lanes] to (with kAdd: onto) rows of entries, one to a query. Reads whole vectors of keys.
  template <bool kAdd, class T>
  static MMK_NOINLINE void transpose_lanes(const float* ds, int64_t stride, int64_t queries, int64_t keys, T* to,
                                           int64_t row) {
    for (int64_t i = 0; i < queries; i += VW) {
      const int64_t count = min(VW, queries - i);
      for (int64_t k = 0; k < keys; k += VW) {
        vf r[VW];
        load_transposed(ds + k * stride + i, stride, r);
        T* const entries = to + i * row + k;
        const auto put = [&](int x, int64_t n) {
          T* const e = entries + x * row;
          store_from_float(e, kAdd ? load_as_float(e, n) + r[x] : r[x], n);
        };
        if (count == VW && k + VW <= keys) {
          MMK_UNROLL for (int x = 0; x < VW; ++x) put(x, VW);
        } else {
          const int64_t n = min(VW, keys - k);
          for (int x = 0; x < count; ++x) put(x, n);
        }
      }
    }
  }

  int64_t at(const ScoreBlock& block, int64_t query, int64_t key) const {
    return block.b * g_.batch + block.h * g_.head + query * g_.query + key * g_.key;
  }
  // n sums at entries that lie `step` apart.
  void add(int64_t at, int64_t step, vf x, int64_t n) const {
    with_element_type(g_.dtype, g_.data, [&](auto* p) {
      if (!g_.zeroed) {
        store_from_float(p + at, x, n);
      } else if (step == 1) {
        store_from_float(p + at, load_as_float(p + at, n) + x, n);
      } else {
        alignas(64) float lanes[VW];
        store(lanes, x);
        for (int64_t i = 0; i < n; ++i) {
          auto* to = p + at + i * step;
          store_from_float(to, load_as_float(to, 1) + set1(lanes[i]), 1);
        }
      }
    });
  }
  int64_t slot(const Place& x) const {
    int64_t s = g_.batch == 0 ? 0 : x.b;
    if (g_.head != 0) s = s * heads_ + x.h;
    if (g_.query != 0) s = s * query_blocks_ + x.t;
    if (g_.key != 0) s = s * key_blocks_ + x.j;
    return s;
  }
  int32_t rank(const Place& x) const {  // tasks are claimed in the order of b, h, t, part
    int64_t r = g_.batch == 0 ? x.b : 0;
    if (g_.head == 0) r = r * heads_ + x.h;
    if (g_.query == 0) r = r * query_blocks_ + x.t;
    if (g_.key == 0) r = r * parts_ + x.part;
    return static_cast<int32_t>(r);
  }

  MaskGradient g_;
  int64_t heads_, query_blocks_, key_blocks_, parts_, slots_ = 0;
  bool shared_ = false;
  int32_t* turns_ = nullptr;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// A mask's entries for a block of scores, laid out as the scores are.
#pragma once

#include "csrc/attention/geometry.h"
#include "csrc/cpu/element.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Where a block of scores stands.
struct ScoreBlock {
  int64_t b = 0, h = 0, kv_head = 0;
  const KeySegment* segment = nullptr;
  int64_t key_in_segment = 0, key = 0, keys = 0;  // first key in its segment and among all keys, and their number
  int64_t query = 0, queries = 0;                 // first query among all queries, and their number
  float bias = 0.f;                               // that of the segments
};

// Boolean masks are read as 0 and -inf; -inf hides a score whatever it is added to.
struct MaskTile {
  enum Kind { none, per_key, per_query, full } kind = none;
  float* entries = nullptr;  // [keys], [lanes] or [keys][stride]
  bool all_masked = false;   // only told of a mask per key
};

MMK_INLINE vf load_entries(const uint8_t* p) { return select(load_bool(p), zero(), set1(-kInfinity)); }
MMK_INLINE vf load_entries(const uint8_t* p, int64_t n) {
  if (n >= VW) return load_entries(p);
  alignas(16) uint8_t bytes[VW] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  return select(load_bool(bytes), zero(), set1(-kInfinity));
}
template <class T>
MMK_INLINE vf load_entries(const T* p) {
  return load_as_float(p);
}
template <class T>
MMK_INLINE vf load_entries(const T* p, int64_t n) {
  return load_as_float(p, n);
}

// Calls f with the entries from `at` on.
template <class Function>
MMK_INLINE void with_entries(const AttentionMask& mask, int64_t at, Function f) {
  if (mask.dtype == Dtype::boolean) return f(static_cast<const uint8_t*>(mask.data) + at);
  with_element_type(mask.dtype, mask.data, [&](const auto* p) { f(p + at); });
}

// Tells the caller of a mask that it hides scores: none of `lowest` is above any entry.
MMK_INLINE void report_hidden(const AttentionMask& mask, vf lowest) {
  if (mask.hides != nullptr && max_lane(-lowest) == kInfinity) __atomic_store_n(mask.hides, true, __ATOMIC_RELAXED);
}

// `count` entries that lie `step` apart.
inline void load_mask_strided(const AttentionMask& mask, int64_t at, int64_t step, int64_t count, float* out) {
  vf lowest = zero();
  with_entries(mask, at, [&](const auto* from) {
    if (step == 1) {
      for (int64_t i = 0; i < count; i += VW) {
        const vf x = load_entries(from + i, count - i);
        lowest = min(x, lowest);
        store_from_float(out + i, x, count - i);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const vf x = load_entries(from + i * step, 1);
        lowest = min(x, lowest);
        store_partial(out + i, x, 1);
      }
    }
  });
  report_hidden(mask, lowest);
}

// Rows of entries, one to a query → [keys][stride] with the queries in the lanes. Lanes behind the last query repeat
// it, and whole vectors of keys are stored.
template <class T>
MMK_NOINLINE vf transpose_rows(const T* from, int64_t row, int64_t queries, int64_t keys, float* to, int64_t stride) {
  vf lowest = zero(), r[VW];
  const auto put = [&](int64_t i, int64_t k, vf x) {
    lowest = min(x, lowest);
    store(to + k * stride + i, x);
  };
  for (int64_t i = 0; i < queries; i += VW) {
    int64_t k = 0;
    if (i + VW <= queries) {
      const T* const first = from + i * row;
      if constexpr (std::is_same_v<T, Bf16>) {  // two keys to a lane while they are transposed
        for (; k + 2 * VW <= keys; k += 2 * VW) {
          load_transposed(static_cast<const void*>(first + k), row * static_cast<int64_t>(sizeof(T)), r);
          MMK_UNROLL for (int x = 0; x < VW; ++x) {
            put(i, k + 2 * x, low_bf16(r[x]));
            put(i, k + 2 * x + 1, high_bf16(r[x]));
          }
        }
      } else if constexpr (std::is_same_v<T, float>) {
        for (; k + VW <= keys; k += VW) {
          load_transposed(first + k, row, r);
          MMK_UNROLL for (int x = 0; x < VW; ++x) put(i, k + x, r[x]);
        }
      }
    }
    const T* rows[VW];
    for (int x = 0; x < VW; ++x) rows[x] = from + min(i + x, queries - 1) * row;
    for (; k < keys; k += VW) {
      for (int x = 0; x < VW; ++x) r[x] = load_entries(rows[x] + k, keys - k);
      transpose(r);
      MMK_UNROLL for (int x = 0; x < VW; ++x) put(i, k + x, r[x]);
    }
  }
  return lowest;
}

// The rows of a block of a full mask, of which `keys` are still to be cut by lengths and windows.
inline RowPrefetch prefetch_mask(const AttentionMask& mask, int64_t b, int64_t h, int64_t query, int64_t queries,
                                 const KeyBlock& keys, int64_t steps) {
  if (mask.data == nullptr || mask.query == 0 || mask.key != 1) return {};
  const int64_t size = mask.dtype == Dtype::boolean ? 1 : element_size(mask.dtype);
  const int64_t at = b * mask.batch + h * mask.head + query * mask.query + keys.position;
  return {static_cast<const char*>(mask.data) + at * size, keys.count * size, mask.query * size, queries, steps};
}

inline void load_mask_tile(const AttentionMask& mask, const ScoreBlock& block, int64_t stride, MaskTile& tile) {
  if (mask.data == nullptr) return;
  const int64_t queries = block.queries, keys = block.keys;
  const int64_t at = block.b * mask.batch + block.h * mask.head + block.query * mask.query + block.key * mask.key;
  if (mask.query == 0) {  // also a mask that is the same everywhere
    tile.kind = MaskTile::per_key;
    load_mask_strided(mask, at, mask.key, keys, tile.entries);
    tile.all_masked = true;
    for (int64_t i = 0; i < keys && tile.all_masked; ++i) tile.all_masked = tile.entries[i] == -kInfinity;
  } else if (mask.key == 0) {
    tile.kind = MaskTile::per_query;
    for (int64_t i = queries; i < round_up(queries, VW); ++i) tile.entries[i] = 0.f;
    load_mask_strided(mask, at, mask.query, queries, tile.entries);
  } else {
    tile.kind = MaskTile::full;
    with_entries(mask, at, [&](const auto* from) {
      if (mask.key == 1) {
        report_hidden(mask, transpose_rows(from, mask.query, queries, keys, tile.entries, stride));
        return;
      }
      vf lowest = zero();
      for (int64_t i = 0; i < round_up(queries, VW); ++i) {
        const auto* row = from + min(i, queries - 1) * mask.query;
        for (int64_t k = 0; k < keys; ++k) {
          const vf x = load_entries(row + k * mask.key, 1);
          lowest = min(x, lowest);
          store_partial(tile.entries + k * stride + i, x, 1);
        }
      }
      report_hidden(mask, lowest);
    });
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

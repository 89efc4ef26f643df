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
  float* second = nullptr;   // the same, for a second mask until it has joined the first
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

inline MaskTile::Kind kind_of(const AttentionMask& mask) {
  if (mask.data == nullptr) return MaskTile::none;
  if (mask.query == 0) return MaskTile::per_key;  // also a mask that is the same everywhere
  return mask.key == 0 ? MaskTile::per_query : MaskTile::full;
}

// Of two masks the one whose rows come from afar.
inline const AttentionMask& larger_mask(const AttentionParams& p) {
  return kind_of(p.second_mask) == MaskTile::full && kind_of(p.mask) != MaskTile::full ? p.second_mask : p.mask;
}

// What two masks add to a score; -inf hides whatever it is added to.
MMK_INLINE vf joined_entry(vf a, vf b) {
  const vf hidden = set1(-kInfinity);
  return select(a == hidden, hidden, select(b == hidden, hidden, a + b));
}

inline bool hides_all(const float* entries, int64_t count) {
  int64_t i = 0;
  while (i < count && entries[i] == -kInfinity) ++i;
  return i == count;
}

// tile.entries become those of both masks, of `kind` (per_key or per_query) in tile.second and of tile.kind so far.
inline void join_entries(MaskTile& tile, MaskTile::Kind kind, int64_t lanes, int64_t keys, int64_t stride) {
  if (tile.kind == kind) {
    const int64_t count = kind == MaskTile::per_key ? round_up(keys, VW) : lanes;
    for (int64_t i = 0; i < count; i += VW)
      store(tile.entries + i, joined_entry(load(tile.entries + i), load(tile.second + i)));
    return;
  }
  for (int64_t i = 0; i < keys; ++i) {
    float* const row = tile.entries + i * stride;
    if (kind == MaskTile::per_key && tile.second[i] == 0.f) continue;
    for (int64_t x = 0; x < lanes; x += VW) {
      const vf entry = kind == MaskTile::per_key ? set1(tile.second[i]) : load(tile.second + x);
      store(row + x, joined_entry(entry, load(row + x)));
    }
  }
}

inline void load_mask(const AttentionMask& mask, const ScoreBlock& block, int64_t stride, MaskTile::Kind kind,
                      float* entries) {
  const int64_t queries = block.queries, keys = block.keys;
  const int64_t at = block.b * mask.batch + block.h * mask.head + block.query * mask.query + block.key * mask.key;
  if (kind == MaskTile::per_key) {
    load_mask_strided(mask, at, mask.key, keys, entries);
  } else if (kind == MaskTile::per_query) {
    for (int64_t i = queries; i < round_up(queries, VW); ++i) entries[i] = 0.f;
    load_mask_strided(mask, at, mask.query, queries, entries);
  } else {
    with_entries(mask, at, [&](const auto* from) {
      if (mask.key == 1) {
        report_hidden(mask, transpose_rows(from, mask.query, queries, keys, entries, stride));
        return;
      }
      vf lowest = zero();
      for (int64_t i = 0; i < round_up(queries, VW); ++i) {
        const auto* row = from + min(i, queries - 1) * mask.query;
        for (int64_t k = 0; k < keys; ++k) {
          const vf x = load_entries(row + k * mask.key, 1);
          lowest = min(x, lowest);
          store_partial(entries + k * stride + i, x, 1);
        }
      }
      report_hidden(mask, lowest);
    });
  }
}

// The entries of both masks, or of one, for a block. One per key comes first: where it hides them all, that is all.
inline void load_mask_tile(const AttentionParams& p, const ScoreBlock& block, int64_t stride, MaskTile& tile) {
  const MaskTile::Kind kinds[] = {kind_of(p.mask), kind_of(p.second_mask)};
  if (kinds[0] == MaskTile::none) return;
  if (kinds[1] == MaskTile::none) {
    tile.kind = kinds[0];
    load_mask(p.mask, block, stride, tile.kind, tile.entries);
    tile.all_masked = tile.kind == MaskTile::per_key && hides_all(tile.entries, block.keys);
    return;
  }
  const int64_t lanes = round_up(block.queries, VW);
  const bool first_is_smaller = kinds[0] <= kinds[1];
  const AttentionMask &small = first_is_smaller ? p.mask : p.second_mask,
                      &large = first_is_smaller ? p.second_mask : p.mask;
  const MaskTile::Kind small_kind = kinds[first_is_smaller ? 0 : 1], large_kind = kinds[first_is_smaller ? 1 : 0];
  load_mask(small, block, stride, small_kind, tile.second);
  if (small_kind == MaskTile::per_key && hides_all(tile.second, block.keys)) {
    tile.all_masked = true;
    return;
  }
  load_mask(large, block, stride, large_kind, tile.entries);
  tile.kind = large_kind;
  if (small_kind == MaskTile::full) {
    for (int64_t i = 0; i < block.keys; ++i) {
      for (int64_t x = i * stride; x < i * stride + lanes; x += VW)
        store(tile.entries + x, joined_entry(load(tile.second + x), load(tile.entries + x)));
    }
    return;
  }
  if (small_kind == MaskTile::per_key && large_kind == MaskTile::per_query) {
    for (int64_t i = block.keys - 1; i >= 0; --i)  // the first row, which all are made from, comes last
      std::memmove(tile.entries + i * stride, tile.entries, sizeof(float) * static_cast<size_t>(lanes));
    tile.kind = MaskTile::full;
  }
  join_entries(tile, small_kind, lanes, block.keys, stride);
  tile.all_masked = tile.kind == MaskTile::per_key && hides_all(tile.entries, block.keys);
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

// The shape of one attention call as its kernels see it: blocks of queries, blocks of keys, and who may attend to what.
#pragma once

#include "csrc/attention/attention.h"
#include "csrc/cpu/prefetch.h"
#include "csrc/cpu/schedule.h"
#include "csrc/cpu/tile.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kLanes = kScoreVectors * VW;  // queries that a score tile holds in its lanes

struct Range {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

MMK_INLINE Range intersect(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// Rows that a batch element has in a segment.
template <class Segment>
MMK_INLINE int64_t length_of(const Segment& s, int64_t b) {
  return s.starts == nullptr ? s.length : s.starts[b + 1] - s.starts[b];
}
// Where (b, h, row) lies among numbers of which there is one per row, heads being those of queries or of keys.
template <class Segment>
MMK_INLINE int64_t number_at(const AttentionParams& p, const Segment& s, int64_t heads, int64_t b, int64_t h,
                             int64_t row) {
  return s.starts == nullptr ? (b * heads + h) * s.length + row : h * s.starts[p.batch] + s.starts[b] + row;
}

struct QueryBlock {
  const QuerySegment* segment;
  int64_t first;     // within the segment
  int64_t count;     // of queries
  int vectors;       // of VW lanes that hold them
  int64_t position;  // of the first among the queries of all segments
};

struct KeyBlock {
  const KeySegment* segment;
  int index;         // of the segment
  int64_t first;     // within the segment
  int64_t count;     // of keys, before lengths and windows cut it
  int64_t position;  // of the first among the keys of all segments
};

// Where group g of `groups` begins among `vectors` of lanes: groups are as equal as whole vectors allow or, where
// kWhole is their width and not 0, as wide as that but for the last.
template <int kWhole>
MMK_INLINE int64_t group_begin(int64_t g, int64_t groups, int64_t vectors) {
  return kWhole > 0 ? min(g * kWhole, vectors) : g * vectors / groups;
}

// Group g of a block of queries.
template <int kWhole>
MMK_INLINE QueryBlock group_of(const QueryBlock& q, int64_t g, int64_t groups) {
  const int64_t begin = group_begin<kWhole>(g, groups, q.vectors), end = group_begin<kWhole>(g + 1, groups, q.vectors);
  const int64_t skip = begin * VW;
  return {q.segment, q.first + skip, min(q.count, end * VW) - skip, static_cast<int>(end - begin), q.position + skip};
}

constexpr int64_t kLongest = -1;  // in place of a batch element

// One batch element, or the longest, in blocks of at most kMaxGroups groups of queries, none wider than a score tile
// or than kWhole vectors (see group_begin), and of kKeys keys; none spans segments.
template <int kMaxGroups, int kKeys, int kWhole = 0>
class Blocks {
 public:
  explicit Blocks(const AttentionParams& p, int64_t batch = kLongest, int64_t max_groups = kMaxGroups)
      : p_(p), batch_(batch), max_groups_(max_groups) {
    for (int s = 0; s < p.query_segments; ++s) {
      query_blocks += blocks_of(p.queries[s]);
      queries += length(p.queries[s]);
    }
    for (int s = 0; s < p.key_segments; ++s) {
      key_blocks += ceil_div(length(p.keys[s]), kKeys);
      keys += length(p.keys[s]);
    }
  }

  QueryBlock query_block(int64_t t) const {
    int64_t position = 0;
    const QuerySegment* s = p_.queries;
    for (; t >= blocks_of(*s); ++s) {
      t -= blocks_of(*s);
      position += length(*s);
    }
    const int64_t vectors = ceil_div(length(*s), VW), groups = groups_of(*s), blocks = blocks_of(*s);
    const int64_t begin = group_begin<kWhole>(t * groups / blocks, groups, vectors);
    const int64_t end = group_begin<kWhole>((t + 1) * groups / blocks, groups, vectors);
    const int64_t first = begin * VW;
    return {s, first, min(length(*s), end * VW) - first, static_cast<int>(end - begin), position + first};
  }

  KeyBlock key_block(int64_t j) const {
    int64_t position = 0;
    int index = 0;
    for (; j >= ceil_div(length(p_.keys[index]), kKeys); ++index) {
      j -= ceil_div(length(p_.keys[index]), kKeys);
      position += length(p_.keys[index]);
    }
    const KeySegment* s = p_.keys + index;
    const int64_t first = j * kKeys;
    return {s, index, first, min(kKeys, length(*s) - first), position + first};
  }

  int64_t query_blocks = 0, key_blocks = 0, queries = 0, keys = 0;

 private:
  template <class Segment>
  int64_t length(const Segment& s) const {
    return batch_ == kLongest ? s.length : length_of(s, batch_);
  }
  int64_t groups_of(const QuerySegment& s) const { return ceil_div(length(s), kWhole > 0 ? kWhole * VW : kLanes); }
  int64_t blocks_of(const QuerySegment& s) const { return ceil_div(groups_of(s), max_groups_); }
  const AttentionParams& p_;
  int64_t batch_, max_groups_;
};

// The window: query at position i attends to keys diagonal(i) - left … diagonal(i) + right.
class Window {
 public:
  Window(const AttentionParams& p, int64_t batch, int64_t queries, int64_t keys)
      : left_(min(p.window_left, kLongest)), right_(min(p.window_right, kLongest)) {
    if (!p.bottom_right) return;
    const int64_t* lengths = p.keys[0].lengths;
    shift_ = (lengths != nullptr ? lengths[batch] : keys) - queries;
  }
  bool bounded() const { return left_ >= 0 || right_ >= 0; }
  int64_t begin(int64_t query) const { return left_ < 0 ? 0 : max(0, query + shift_ - left_); }
  int64_t end(int64_t query) const { return right_ < 0 ? INT64_MAX : max(0, query + shift_ + right_ + 1); }
  // Keys that some query, or every query, of first … first + count - 1 may attend to.
  Range any(int64_t first, int64_t count) const { return {begin(first), end(first + count - 1)}; }
  Range all(int64_t first, int64_t count) const { return {begin(first + count - 1), end(first)}; }

 private:
  static constexpr int64_t kLongest = int64_t{1} << 62;  // no position is beyond, and no sum of two overflows
  int64_t left_, right_, shift_ = 0;
};

// How many score tiles `keys` keys make for `vectors` vectors of queries, cut into groups of kScoreVectors.
MMK_INLINE int64_t score_tiles(int64_t vectors, int64_t keys) {
  const int64_t groups = ceil_div(vectors, kScoreVectors);
  int64_t tiles = 0;
  for (int64_t g = 0; g < groups; ++g) {
    tiles += keys / score_rows(static_cast<int>(vectors * (g + 1) / groups - vectors * g / groups));
  }
  return max(1, tiles);
}

// A key head, and where it is packed.
struct KeyHead {
  int64_t slot, b, h;
};

// Where the bias of two segments lies for one head.
MMK_INLINE int64_t bias_at(const AttentionParams& p, int64_t h, const QuerySegment* q, const KeySegment* k) {
  return h * p.bias.head + (q - p.queries) * p.key_segments + (k - p.keys);
}
MMK_INLINE float bias_of(const AttentionParams& p, int64_t h, const QuerySegment* q, const KeySegment* k) {
  return p.bias.data == nullptr ? 0.f : p.bias.data[bias_at(p, h, q, k)];
}

// The tasks of a call, key head by key head: for every head, block of queries and part of the keys.
class TaskGrid {
 public:
  // blocks(b): how many blocks of queries a batch element has.
  template <class Function>
  TaskGrid(const AttentionParams& p, int64_t parts, bool packed, Function blocks)
      : kv_heads_(p.kv_heads), batch_(p.batch), ends_(packed ? 2 * p.batch : 0) {
    const int64_t each = p.heads / p.kv_heads * parts;
    if (!packed) {
      per_head_ = each * blocks(kLongest);
      return;
    }
    auto* const ends = reinterpret_cast<int64_t*>(ends_.data());
    for (int64_t b = 0, end = 0; b < batch_; ++b) ends[b] = end += kv_heads_ * each * blocks(b);
  }

  struct Place {
    int64_t b, kv_head, task;  // the task being that of its key head
  };
  // How many tasks the first `heads` key heads have.
  int64_t tasks(int64_t heads) const {
    if (ends() == nullptr) return heads * per_head_;
    const int64_t b = heads / kv_heads_;
    return b == batch_ ? end(b - 1) : end(b - 1) + heads % kv_heads_ * ((end(b) - end(b - 1)) / kv_heads_);
  }
  Place place(int64_t task) const {
    if (ends() == nullptr) {
      const int64_t head = task / per_head_;
      return {head / kv_heads_, head % kv_heads_, task % per_head_};
    }
    int64_t b = 0;
    for (int64_t count = batch_; count > 0;) {  // the first that ends behind the task
      const int64_t half = count / 2;
      if (end(b + half) <= task) {
        b += half + 1;
        count -= half + 1;
      } else {
        count = half;
      }
    }
    const int64_t per_head = (end(b) - end(b - 1)) / kv_heads_, of_element = task - end(b - 1);
    return {b, of_element / per_head, of_element % per_head};
  }

 private:
  const int64_t* ends() const { return reinterpret_cast<const int64_t*>(ends_.data()); }
  int64_t end(int64_t b) const { return b < 0 ? 0 : ends()[b]; }
  int64_t kv_heads_, batch_, per_head_ = 0;
  Scratch ends_;  // [B], where the tasks of a batch element end
};

// Keys of a segment that are not padding.
MMK_INLINE int64_t valid_keys(const KeySegment& s, int64_t batch) {
  return s.lengths == nullptr ? length_of(s, batch) : min(s.length, max(0, s.lengths[batch]));
}

// Into how many parts the keys are cut when there are too few queries to fill a machine's threads. Depends on the
// shape alone, so that results do not depend on the number of threads.
constexpr int64_t kFewQueries = 16, kMaxParts = 32;
MMK_INLINE int64_t key_parts(int64_t tasks, int64_t key_blocks, int64_t min_blocks) {
  return max(1, min(kMaxParts / max(1, tasks), key_blocks / min_blocks));
}

MMK_INLINE void* row_address(const Rows& rows, Dtype dtype, int64_t b, int64_t h, int64_t l) {
  const int64_t start = rows.starts == nullptr ? b * rows.batch : rows.starts[b] * rows.row;
  return static_cast<char*>(rows.data) + element_size(dtype) * (start + h * rows.head + l * rows.row);
}

// The rows that the next task will read, most likely: those behind `q`, or as many of the next head.
inline RowPrefetch next_rows(const AttentionParams& p, const Rows& rows, int64_t features, const QueryBlock& q,
                             int64_t b, int64_t h, int64_t steps) {
  int64_t first = q.first + q.count;
  if (first >= length_of(*q.segment, b)) {
    first = 0;
    if (++h == p.heads) h = 0, ++b;
    if (b == p.batch) return {};
  }
  const int64_t size = element_size(p.dtype);
  return {row_address(rows, p.dtype, b, h, first), features * size, rows.row * size,
          min(q.count, length_of(*q.segment, b) - first), steps};
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk

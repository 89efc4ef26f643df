// The attention core: every op of the family is one call of it with its own list of query and key segments.
//
//   S = scale · Q Kᵀ;  S = softcap · tanh(S / softcap);  S += masks + bias;  P = softmax(S);  O = dropout(P) V
//
// The keys of all segments form one sequence, and so do the queries; nothing is concatenated. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

constexpr int kMaxSegments = 8;

// Row l of (batch b, head h) starts at data + b·batch + h·head + l·row (in elements); its features are contiguous. In a
// packed batch it starts at data + h·head + (starts[b] + l)·row.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  const int64_t* starts = nullptr;
};

// Where a [B, H, length] stands below, a packed batch has [H, starts[B]].
struct QuerySegment {
  Rows query, out, grad_out, grad_query;
  float* row_max = nullptr;             // [B, H, length], the shift of the softmax; -inf where nothing is attended
  float* log_sum = nullptr;             // [B, H, length], log Σ exp(S - row_max): lse = row_max + log_sum
  const float* grad_log_sum = nullptr;  // [B, H, length]
  int64_t length = 0;                   // of every batch element; of the longest in a packed batch
  const int64_t* starts = nullptr;  // [B + 1], a packed batch: element b has the rows from starts[b] to starts[b + 1]
};

struct KeySegment {
  Rows key, value, grad_key, grad_value;
  const int64_t* lengths = nullptr;   // [B], keys beyond are padding
  const uint8_t* poisoned = nullptr;  // [B, Hkv, length], a key that makes NaN of every row that may attend to it
  int64_t length = 0;
  const int64_t* starts = nullptr;  // as those of queries
};

struct AttentionMask {  // [B, H, Σ query lengths, Σ key lengths], stride 0 where it is broadcast
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;  // or boolean: true attends
  int64_t batch = 0, head = 0, query = 0, key = 0;
  bool* hides = nullptr;  // set to true once an entry hides a score
};

// The gradient of a float mask, summed over what is broadcast.
struct MaskGradient {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;  // not f32: no element is broadcast, each is written at most once
  int64_t batch = 0, head = 0, query = 0, key = 0;
  bool zeroed = true;  // else every entry belongs to one score of the call, and is written whatever it held
};

// One number for all scores of a query segment and a key segment, [H, query segments, key segments]; -inf forbids them.
struct SegmentBias {
  const float* data = nullptr;
  float* grad = nullptr;  // the same shape and strides
  int64_t head = 0;       // between two heads, 0 where they share it
};

struct AttentionParams {
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  Dtype dtype = Dtype::f32;
  int query_segments = 0, key_segments = 0;
  QuerySegment queries[kMaxSegments];
  KeySegment keys[kMaxSegments];
  AttentionMask mask, second_mask;  // both are added to S; never the second alone
  MaskGradient grad_mask;           // of either, or of what both are broadcast to
  const float* sinks = nullptr;     // [H], a logit more in the softmax of every row, without a key; -inf is none
  float* grad_sinks = nullptr;      // [H]
  SegmentBias bias;
  int64_t window_left = -1, window_right = -1;  // around the diagonal, -1 unbounded; causal is window_right = 0
  bool bottom_right = false;                    // the diagonal ends at the last valid key, not starts at the first
  float softcap = 0.f, scale = 1.f, dropout_p = 0.f;
  uint64_t seed = 0;
  uint32_t offset = 0;
  Workers workers;
};

MMK_KERNEL(void, attention_forward, const AttentionParams&);
// As forward for at most 4 queries a head (in a packed batch as many for each element), no dropout and no row_max and
// log_sum: dot products on whole rows.
MMK_KERNEL(void, attention_few_queries, const AttentionParams&);
// Writes each gradient whose data is set, segment by segment.
MMK_KERNEL(void, attention_backward, const AttentionParams&);

}  // namespace mmk

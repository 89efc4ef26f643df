// The attention over the union of several sets of keys, from the attention over each.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

// A part's row r: features at out + r · features, lse[r]; all contiguous.
struct MergePart {
  const void* out = nullptr;
  const float* lse = nullptr;
  void* grad_out = nullptr;
  float* grad_lse = nullptr;
};

struct MergeAttentionParams {
  int64_t rows = 0, features = 0, parts = 0;
  Dtype dtype = Dtype::f32;
  const MergePart* part = nullptr;
  void* out = nullptr;
  float* lse = nullptr;  // in the backward an input, as out is
  const void* grad_out = nullptr;
  const float* grad_lse = nullptr;
  Workers workers;
};

MMK_KERNEL(void, merge_attention_forward, const MergeAttentionParams&);
// Writes each gradient whose data is set.
MMK_KERNEL(void, merge_attention_backward, const MergeAttentionParams&);

}  // namespace mmk

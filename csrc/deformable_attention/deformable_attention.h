// deformable_attention: every query and head sums few samples of a pyramid of maps.
//
//   out[b, q, h] = Σ_k a[b, q, h, k] · sample(value[b, :, h], location[b, q, h, k]),   k over the points of all levels
//
// Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

struct DeformableSource {
  const void* value = nullptr;  // [B, rows, H, D], strides in elements, features dense
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
  void* grad = nullptr;  // dense, or null where it is not needed
  bool stream = false;   // past the caches, as the outputs below
  int64_t rows = 0;
};

struct DeformableLevel {
  int64_t height = 0, width = 0;
  int64_t first_row = 0;  // among the rows of all sources
  int64_t source = 0, points = 0;
};

// [B, Lq, H, …], what is behind the heads dense.
struct DeformableSamples {
  const void* data = nullptr;
  int64_t batch_stride = 0, query_stride = 0, head_stride = 0;
  Dtype dtype = Dtype::f32;
};

struct DeformableParams {
  int64_t batch = 0, queries = 0, heads = 0, width = 0;
  int64_t points = 0, rows = 0;  // of all levels, of all sources
  Dtype dtype = Dtype::f32;      // of values, weights and outputs
  const DeformableSource* sources = nullptr;
  int64_t source_count = 0;
  const DeformableLevel* levels = nullptr;
  int64_t level_count = 0;
  DeformableSamples locations, weights;  // [points, 2] and [points] behind the heads
  const uint8_t* presence = nullptr;     // [sources] of each batch element, or null
  int64_t presence_stride = 0;
  bool discrete = false;
  Workers workers{};

  void* out = nullptr;  // [B, Lq, H, D]
  bool stream_out = false;

  const void* grad_out = nullptr;  // [B, Lq, H · D], the last dim dense
  int64_t grad_batch_stride = 0, grad_query_stride = 0;
  bool needs_values = false;       // any source's grad
  void* grad_locations = nullptr;  // dense; null where it is not needed
  void* grad_weights = nullptr;
  bool stream_samples = false;  // their gradients
};

MMK_KERNEL(void, deformable_attention_forward, const DeformableParams&);
MMK_KERNEL(void, deformable_attention_backward, const DeformableParams&);

}  // namespace mmk

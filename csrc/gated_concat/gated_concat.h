// gated_concat: features gated by what they stand beside.
//
//   g = σ([x; y] Wᵀ + b),  out = [g ∘ x; y; s],  s = Σ_k g_k x_k
//
// Torch-free.
#pragma once

#include "csrc/concat/sources.h"
#include "csrc/cpu/isa.h"

namespace mmk {

struct GatedConcatParams {
  ConcatSources sources;  // x and y, those of them that have columns, z having Kx columns or 1
  RowView x, y;
  int64_t x_width = 0, y_width = 0;
  int64_t x_item = -1, y_item = -1;  // among the sources
  const void* bias = nullptr;        // [Kx or 1], or null
  Workers workers{};

  void* gate = nullptr;  // [rows, Kx or 1]; forward: written; backward: read
  void* out = nullptr;   // [rows, Kx + Ky + 1]

  RowView grad_out;
  void* grad_bias = nullptr;
};

MMK_KERNEL(void, gated_concat_forward, const GatedConcatParams&);
MMK_KERNEL(void, gated_concat_backward, const GatedConcatParams&);

}  // namespace mmk

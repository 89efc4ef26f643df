// gated_fusion: the gated multimodal unit.
//
//   h_i = tanh(W_i x_i + b_i),  w = softmax over present i of (W_z [x₁; …; x_M] + b_z),  y = Σ_i w_i ∘ h_i
//
// and in the sigmoid form, for two modalities, w₁ = σ(W_z [x₁; x₂] + b_z), w₂ = 1 - w₁. Torch-free.
#pragma once

#include "csrc/concat/sources.h"
#include "csrc/cpu/isa.h"

namespace mmk {

struct GatedFusionParams {
  // z of M·N columns of values, then N (sigmoid form) or M·N columns of gates; a source has a term for each.
  ConcatSources sources;
  int64_t modalities = 0, features = 0;  // M, N
  bool sigmoid = false;
  const void* const* value_biases = nullptr;  // [M] of [N], or null
  const void* gate_bias = nullptr;            // [N or M·N], or null
  const uint8_t* present = nullptr;           // [rows, M] at present_stride between rows, or null
  int64_t present_stride = 0;
  Workers workers{};

  void* out = nullptr;      // [rows, N]
  void* values = nullptr;   // [rows, M·N], h; forward: written if set
  void* weights = nullptr;  // [rows, M·N], w, 0 where absent; forward: written if set

  RowView grad_out;
  void* const* grad_value_biases = nullptr;  // [M] of [N], or null; each may be null
  void* grad_gate_bias = nullptr;
};

MMK_KERNEL(void, gated_fusion_forward, const GatedFusionParams&);
MMK_KERNEL(void, gated_fusion_backward, const GatedFusionParams&);

}  // namespace mmk

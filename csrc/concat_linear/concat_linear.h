// concat_linear: a linear layer over the concatenation of several tensors, which is never made.
//
//   z = [x₁; …; x_M] Wᵀ + b,  y = residual + tanh(gate) · act(z)
//
// Torch-free. Rows and features that nobody gave are null.
#pragma once

#include "csrc/concat/sources.h"
#include "csrc/cpu/activation_kind.h"
#include "csrc/cpu/isa.h"

namespace mmk {

struct ConcatLinearParams {
  ConcatSources sources;       // one term each, the source's columns of the weight [N, K]
  const void* bias = nullptr;  // [N]
  const void* gate = nullptr;  // [N], or one number at stride 0
  int64_t gate_stride = 0;
  RowView residual;  // [rows, N]
  Activation activation = Activation::none;
  Workers workers{};

  void* out = nullptr;            // [rows, N] dense; forward: written
  void* preactivation = nullptr;  // [rows, N] dense z; forward: written if set; backward: read

  // Backward. The activation's derivative comes from `out` where that is set, else from `preactivation`.
  RowView grad_out;
  void* grad_bias = nullptr;   // [N]
  float* grad_gate = nullptr;  // [N], of tanh(gate) times its derivative
};

MMK_KERNEL(void, concat_linear_forward, const ConcatLinearParams&);
MMK_KERNEL(void, concat_linear_backward, const ConcatLinearParams&);

}  // namespace mmk

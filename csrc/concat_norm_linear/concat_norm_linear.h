// concat_norm_linear: a norm over the concatenation of several tensors, then a linear layer; neither is ever made.
//
//   x̂ = (c - mean) · rstd of c = [x₁; …; x_M] (rms: mean 0),  y = act((x̂ ∘ g + h) Wᵀ + b)
//
// Torch-free.
#pragma once

#include "csrc/concat_linear/concat_linear.h"

namespace mmk {

struct ConcatNormLinearParams {
  ConcatLinearParams linear;          // no gate, no residual; backward: preactivation holds z whatever the activation
  const void* norm_weight = nullptr;  // [K]
  const void* norm_bias = nullptr;    // [K] or null
  bool rms = false;
  float eps = 0.f;
  float* statistics = nullptr;  // [rows, 2], mean and rstd; forward: written if set; backward: read

  void* grad_weight = nullptr;       // [N, K] dense, or by columns; the terms have their columns of it
  void* grad_norm_weight = nullptr;  // [K]
  void* grad_norm_bias = nullptr;    // [K]
};

MMK_KERNEL(void, concat_norm_linear_forward, const ConcatNormLinearParams&);
MMK_KERNEL(void, concat_norm_linear_backward, const ConcatNormLinearParams&);

}  // namespace mmk

// modulated_norm: out = (norm(x) · weight + bias) · (1 + scale) + shift. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"
#include "csrc/norm/norm.h"

namespace mmk {

struct ModulatedNormParams {
  int64_t batch = 0, length = 0, features = 0;
  Dtype dtype = Dtype::f32;
  Norm norm = Norm::layer;
  float eps = 0.f;
  TokenRows x, out;
  TokenRows shift, scale;  // of every token, or of every batch element: then their rows are not walked
  bool per_token = false;
  const void *weight = nullptr, *bias = nullptr;  // [C], absent: 1 and 0

  TokenRows grad_out;
  TokenRows grad_x, grad_shift, grad_scale;           // data null where not needed, as below
  void *grad_weight = nullptr, *grad_bias = nullptr;  // [C]

  bool stream = false;  // the large results bypass the caches
  Workers workers{};
};

MMK_KERNEL(void, modulated_norm_forward, const ModulatedNormParams&);
MMK_KERNEL(void, modulated_norm_backward, const ModulatedNormParams&);

}  // namespace mmk

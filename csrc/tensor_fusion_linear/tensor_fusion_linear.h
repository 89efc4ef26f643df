// tensor_fusion_linear:  y[b, n] = Σ_k W[n, k] · A[b, k] + bias[n],  A[b] = vec(⊗_i [1; x_i[b]]),  first modality
// slowest.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/workers.h"

namespace mmk {

struct FusedModality {
  const void* data = nullptr;  // [B][width]
  int64_t stride = 0;
  int64_t width = 0;
  void* grad = nullptr;  // [B][width], contiguous; null where it is not wanted
};

struct TensorFusionParams {
  const FusedModality* modalities = nullptr;
  int64_t count = 0;  // at least 1
  int64_t batch = 0, outputs = 0;
  int64_t features = 0;  // K = Π (width_i + 1)
  Dtype dtype = Dtype::f32;
  Matrix weight;                   // [N][K]
  const void* bias = nullptr;      // [N] or null
  void* out = nullptr;             // [B][N], contiguous
  const void* grad_out = nullptr;  // [B][N]
  int64_t grad_out_stride = 0;
  void* grad_weight = nullptr;  // [N][K], dense and by columns where the weight is, or null
  void* grad_bias = nullptr;    // [N] or null
  Workers workers;
};

MMK_KERNEL(void, tensor_fusion_forward, const TensorFusionParams&);
MMK_KERNEL(void, tensor_fusion_grad_weight, const TensorFusionParams&);    // of weight and bias, those that are set
MMK_KERNEL(void, tensor_fusion_grad_features, const TensorFusionParams&);  // of the modalities, those that are set

}  // namespace mmk

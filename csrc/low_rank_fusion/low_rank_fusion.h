// low_rank_fusion:  y[b, n] = Σ_r w[r] · Π_i P_i[r, b, n] + bias[n],  P_i[r] = [1; x_i] F_i[r].
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/workers.h"

namespace mmk {

struct LowRankModality {
  const void* x = nullptr;  // [B][width]
  int64_t x_stride = 0;
  int64_t width = 0;
  Matrix factor;  // [width + 1][N] of the first rank
  int64_t factor_rank_stride = 0;
  void* grad_x = nullptr;       // [B][width], contiguous, or null
  void* grad_factor = nullptr;  // [R][width + 1][N], dense and by columns where the factor is, or null
};

struct LowRankParams {
  const LowRankModality* modalities = nullptr;
  int64_t count = 0;  // at least 1
  int64_t batch = 0, outputs = 0, rank = 0;
  Dtype dtype = Dtype::f32;
  const void* rank_weights = nullptr;  // [R], contiguous
  const void* bias = nullptr;          // [N] or null
  void* out = nullptr;                 // [B][N], contiguous
  const void* grad_out = nullptr;      // [B][N]
  int64_t grad_out_stride = 0;
  void* grad_rank_weights = nullptr;  // [R] or null
  void* grad_bias = nullptr;          // [N] or null
  Workers workers;
};

MMK_KERNEL(void, low_rank_forward, const LowRankParams&);
MMK_KERNEL(void, low_rank_backward, const LowRankParams&);  // writes each gradient that is set

}  // namespace mmk

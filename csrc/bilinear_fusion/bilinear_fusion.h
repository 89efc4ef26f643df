// bilinear_fusion:  z[b, n] = Σ_{j < rank} P[c, b] · Q[c, b],  c = n·rank + j,  P = U xᵀ,  Q = V yᵀ.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/workers.h"

namespace mmk {

// One of the two modalities.
struct BilinearSide {
  const void* x = nullptr;  // [B][width]
  int64_t x_stride = 0;
  int64_t width = 0;
  Matrix weight;                // [rank·N][width]
  void* projection = nullptr;   // [rank·N][B], contiguous; null where the forward need not keep it
  void* grad_x = nullptr;       // [B][width], contiguous, or null
  void* grad_weight = nullptr;  // [rank·N][width], dense and by columns where the weight is, or null
  bool stream = false;          // grad_weight may pass the caches: it is aligned to 64 bytes
};

struct BilinearParams {
  BilinearSide sides[2];
  int64_t batch = 0, outputs = 0, rank = 1;
  Dtype dtype = Dtype::f32;
  void* out = nullptr;             // [B][N], contiguous
  const void* grad_out = nullptr;  // [B][N]
  int64_t grad_out_stride = 0;
  Workers workers;
};

MMK_KERNEL(void, bilinear_forward, const BilinearParams&);
MMK_KERNEL(void, bilinear_backward, const BilinearParams&);  // reads both projections, writes each gradient that is set

}  // namespace mmk

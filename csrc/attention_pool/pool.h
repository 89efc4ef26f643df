// What the attention pools share: rows of modalities, and what becomes of them,
//
//   pooled[b] = Σ_i a[b, i] x_i[b],  a = softmax over the modalities i that are present in row b
//
// with one weight a for a whole x_i[b], or in split attention one for each of its features. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

struct PoolModality {
  const void* x = nullptr;  // [B][D]
  void* grad = nullptr;     // [B][D], or null
  int64_t stride = 0, grad_stride = 0;
};

struct PoolRows {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct Pool {
  const PoolModality* items = nullptr;
  int64_t modalities = 0, rows = 0, width = 0;  // M, B, D
  Dtype dtype = Dtype::f32;
  const uint8_t* present = nullptr;  // [B][M] at a stride between rows, 0 where it is the same for all; or null
  int64_t present_stride = 0;
  Workers workers{};

  void* pooled = nullptr;   // [B][D]
  void* weights = nullptr;  // a, [B][M], in split attention [B][M][D]; dense, 0 where absent
  PoolRows grad_pooled, grad_weights;
};

// Whether a modality is there in a row; one that is not is never read.
[[gnu::always_inline]] inline bool is_present(const Pool& pool, int64_t row, int64_t i) {
  return pool.present == nullptr || pool.present[row * pool.present_stride + i] != 0;
}

}  // namespace mmk

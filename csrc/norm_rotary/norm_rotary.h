// norm_rotary: RMSNorm of each head of queries and keys, and the rotation of its first features by pairs. Torch-free.
#pragma once

#include "csrc/attention/attention.h"
#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"
#include "csrc/norm/norm.h"

namespace mmk {

// Queries or keys.
struct RotatedHeads {
  int64_t heads = 0;
  Rows x, out;
  const void* weight = nullptr;  // [D]; null: no norm
  Rows grad_out, grad_x;         // data of grad_x null where not needed, as below
  void* grad_weight = nullptr;   // [D]
  bool stream = false;           // the results bypass the caches
};

struct NormRotaryParams {
  int64_t batch = 0, length = 0, features = 0, half = 0;  // half: pairs that are rotated
  Dtype dtype = Dtype::f32, table_dtype = Dtype::f32, weight_dtype = Dtype::f32;
  float eps = 0.f;
  bool interleaved = false;
  RotatedHeads sides[2];  // queries, keys
  TokenRows cos, sin;     // [B or 1, L, half]; batch is 0 where all elements have one
  bool one_table = true;  // whether they do
  TokenRows grad_cos, grad_sin;
  Workers workers{};
};

MMK_KERNEL(void, norm_rotary_forward, const NormRotaryParams&);
MMK_KERNEL(void, norm_rotary_backward, const NormRotaryParams&);

}  // namespace mmk

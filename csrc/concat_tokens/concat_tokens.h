// concat_tokens: out[:, start_i + l] = norm(x_i[:, l] + type[i] + position_i[l]) · weight + bias. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"
#include "csrc/norm/norm.h"

namespace mmk {

// One list of tokens [B, length, C]; of embeddings and gradients, data is null where there is none or none is needed.
struct TokenSource {
  int64_t length = 0;
  TokenRows x, grad_x;
  const void* type = nullptr;  // [C]
  TokenRows position;          // [length, C], one for all batch elements
  void* grad_type = nullptr;   // [C]
  TokenRows grad_position;     // [length, C]
};

struct ConcatTokensParams {
  int64_t batch = 0, features = 0;
  Dtype dtype = Dtype::f32, out_dtype = Dtype::f32;
  Norm norm = Norm::none;
  float eps = 0.f;
  const TokenSource* sources = nullptr;
  int64_t source_count = 0;
  const void *weight = nullptr, *bias = nullptr;      // [C], absent: 1 and 0
  TokenRows out, grad_out;                            // [B, Σ length, C]
  void *grad_weight = nullptr, *grad_bias = nullptr;  // [C]
  bool stream = false;                                // the large results bypass the caches
  Workers workers{};
};

MMK_KERNEL(void, concat_tokens_forward, const ConcatTokensParams&);
MMK_KERNEL(void, concat_tokens_backward, const ConcatTokensParams&);

}  // namespace mmk

// bidirectional_cross_attention: two softmaxes over one matrix of scores.
//
//   S = clamp(scale · X Yᵀ),  x_out = softmax over y (S) · y_value,  y_out = softmax over x (Sᵀ) · x_value
//
// Torch-free.
#pragma once

#include "csrc/attention/attention.h"

namespace mmk {

// 2^(exponent - shift - log2_sum) is the probability of a score of that exponent of 2; nothing to attend to: a log2_sum
// of infinity.
struct SoftmaxStats {
  float *shift = nullptr, *log2_sum = nullptr;  // [B, H, length]
};

struct BidirectionalParams {
  // The side of x is the one segment of queries (query, out, grad_out, grad_query), that of y the one segment of keys
  // (key, value, grad_key, grad_value). Kernels have x in their lanes, or on tiles read it where it lies: let it be the
  // longer side.
  AttentionParams attention;
  Rows x_value, y_out, grad_y_out, grad_x_value;
  const uint8_t *x_mask = nullptr, *y_mask = nullptr;  // [B, length], 0 where it is padding; null: no padding
  float clamp = 0.f;                                   // bound of the scores; infinity: none
  SoftmaxStats x, y;                                   // the forward writes them if set
};

MMK_KERNEL(void, bidirectional_forward, const BidirectionalParams&);
MMK_KERNEL(void, bidirectional_backward, const BidirectionalParams&);  // writes each gradient whose data is set

}  // namespace mmk

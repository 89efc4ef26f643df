// multiplicative_attention_pool:  e_i = scale · qᵀ W x_i,  a = softmax over present i of e,  pooled = Σ a_i x_i. The
// kernels take q' = Wᵀ q, or where there is no W, q.
#pragma once

#include "csrc/attention_pool/pool.h"

namespace mmk {

struct MultiplicativePoolParams {
  Pool pool;
  float scale = 1.f;
  PoolRows query;              // q', [B][D]
  void* grad_query = nullptr;  // [B][D], dense, or null
};

MMK_KERNEL(void, multiplicative_pool_forward, const MultiplicativePoolParams&);
MMK_KERNEL(void, multiplicative_pool_backward, const MultiplicativePoolParams&);

}  // namespace mmk

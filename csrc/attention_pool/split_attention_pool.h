// split_attention_pool:  g = Σ x_i over present i,  z = act(W₁ g + b₁),  e = W₂ z + b₂ as [B][M][D],
// a = softmax over present i of e, per feature,  pooled = Σ a_i ∘ x_i. The kernels here are what surrounds the
// products.
#pragma once

#include "csrc/attention_pool/pool.h"

namespace mmk {

struct SplitPoolParams {
  Pool pool;            // weights: e before split_pool_forward, a after
  void* sum = nullptr;  // [B][D], dense: g, or in the backward its gradient

  void* grad_energies = nullptr;  // de, [B][M][D], dense
};

MMK_KERNEL(void, split_pool_sum, const SplitPoolParams&);               // g
MMK_KERNEL(void, split_pool_forward, const SplitPoolParams&);           // e → a, pooled
MMK_KERNEL(void, split_pool_energy_gradients, const SplitPoolParams&);  // de
MMK_KERNEL(void, split_pool_source_gradients, const SplitPoolParams&);  // dx_i, those that are wanted

}  // namespace mmk

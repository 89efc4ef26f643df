// decision_fusion: the probabilities of several classifiers, one for each modality, as one. Torch-free.
#pragma once

#include "csrc/attention_pool/pool.h"

namespace mmk {

enum class FusionMethod { mean, log, product, max, vote };

struct DecisionFusionParams {
  Pool pool;                      // items: logits, [B][C] each; pooled: the probabilities; grad_pooled: theirs
  const void* weights = nullptr;  // [M], or [B][M] at a stride between rows; null: all alike
  int64_t weights_stride = 0;
  FusionMethod method = FusionMethod::mean;

  float* grad_weights = nullptr;  // [B][M], dense, what each row adds; or null
};

MMK_KERNEL(void, decision_fusion_forward, const DecisionFusionParams&);
MMK_KERNEL(void, decision_fusion_backward, const DecisionFusionParams&);  // never of vote, which has none

}  // namespace mmk

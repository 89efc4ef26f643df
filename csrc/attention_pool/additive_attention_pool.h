// additive_attention_pool:  e_i = v · tanh(W x_i + W_q q + b),  a = softmax over present i of e,  pooled = Σ a_i x_i.
#pragma once

#include "csrc/attention_pool/pool.h"
#include "csrc/concat/sources.h"

namespace mmk {

struct AdditivePoolParams {
  Pool pool;
  // Many rows: z [B] has M·A columns, modality i in columns i·A …, and A more of W_q q where there is a query.
  // Few (flat): z [B·M] has A columns, and the sources are all modalities as one, and the query, repeated for each.
  // The query's source is the last.
  ConcatSources sources;
  bool flat = false;
  const int32_t* modalities = nullptr;  // not flat: of the other sources, those that some row has
  int64_t hidden = 0;                   // A
  bool has_query = false;
  const void* vector = nullptr;  // [A]
  const void* bias = nullptr;    // [A], or null
  void* activations = nullptr;   // tanh(…), [B][M·A], 0 where absent; forward: written if set

  void* grad_vector = nullptr;
  void* grad_bias = nullptr;
};

MMK_KERNEL(void, additive_pool_forward, const AdditivePoolParams&);
MMK_KERNEL(void, additive_pool_backward, const AdditivePoolParams&);

}  // namespace mmk

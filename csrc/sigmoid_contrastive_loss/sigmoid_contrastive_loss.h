// sigmoid_contrastive_loss: every pair of rows on its own. Torch-free.
#pragma once

#include "csrc/contrastive/tile.h"
#include "csrc/cpu/isa.h"

namespace mmk {

struct SigmoidTile {
  PairTile pairs;
  float bias = 0.f;
  bool with_gradients = false;  // in place of the products: of the logits, without 1 / total
  double* losses = nullptr;     // [rows of all], Σ_j −log σ(l_ij z_ij)
  double* of_scale = nullptr;   // [rows of all], Σ_j of the gradients times the products
  double* of_bias = nullptr;    // [rows of all], Σ_j of the gradients
};

MMK_KERNEL(void, sigmoid_pairs, const SigmoidTile&);

}  // namespace mmk

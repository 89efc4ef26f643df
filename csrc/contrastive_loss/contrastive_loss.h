// contrastive_loss: softmaxes of the products of pairs, over columns and over rows. Torch-free.
#pragma once

#include "csrc/contrastive/tile.h"
#include "csrc/cpu/isa.h"

namespace mmk {

// The largest product of a row or column, and the sum of the exponentials of the logits' distances from its logit.
struct SoftmaxSums {
  float *top = nullptr, *total = nullptr;
};

struct ContrastiveTile {
  PairTile pairs;
  const int64_t *row_labels = nullptr, *column_labels = nullptr;  // of all rows, [columns]; null: first_target + row
  const float *row_share = nullptr, *column_share = nullptr;      // of each of the positives in the target, or null: 1
  SoftmaxSums of_rows;                                            // of all rows
  SoftmaxSums of_columns;                                         // [columns], raised by every tile; null: rows alone

  // Forward.
  double* targets = nullptr;  // [rows of all], Σ of the positives' products times their shares in row and column
  double* sums = nullptr;     // [rows of all], Σ of the products

  // Backward: gradients of the logits, in place of the products.
  const float *row_weight = nullptr, *column_weight = nullptr;  // of the softmaxes
  float of_positive = 1.f;                                      // times a share
  float of_all = 0.f;                                           // what label smoothing takes off every logit
  float* of_positives = nullptr;                                // [columns], for the gradients of a row's positives
  double* of_scale = nullptr;  // [rows of all], Σ_j of the gradients times the products
};

MMK_KERNEL(void, contrastive_statistics, const ContrastiveTile&);
MMK_KERNEL(void, contrastive_gradients, const ContrastiveTile&);

}  // namespace mmk

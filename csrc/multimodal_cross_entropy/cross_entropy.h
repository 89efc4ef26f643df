// Cross-entropy of rows of logits, those of each modality by themselves.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

enum class CrossEntropyKind : int8_t { plain, gce, symmetric };

// One modality's rows: row r has its logits at logits + r · stride.
struct CrossEntropyRows {
  const void* logits = nullptr;
  int64_t stride = 0, classes = 0;
  const int64_t* labels = nullptr;
  const uint8_t* present = nullptr;  // null: all are
  int64_t present_stride = 0;
  float* statistics = nullptr;  // [rows][2]: the softmax's top and total; in the backward an input
  float* losses = nullptr;      // [rows]
  void* grad = nullptr;         // [rows][grad_stride]; it may be the logits
  int64_t grad_stride = 0;
  float scale = 1.f;  // of the gradient
};

struct CrossEntropyParams {
  int64_t rows = 0, modalities = 0;
  Dtype dtype = Dtype::f32;
  CrossEntropyKind kind = CrossEntropyKind::plain;
  int64_t ignore_index = -100;
  float label_smoothing = 0.f, q = 1.f;
  bool stream = false;  // gradients pass the caches
  const CrossEntropyRows* items = nullptr;
  Workers workers;

  // A row that is not valid has loss 0 and gradient 0, and is not read. Labels of valid rows are below the classes.
  [[gnu::always_inline]] bool is_valid(const CrossEntropyRows& item, int64_t row) const {
    return item.labels[row] != ignore_index && (item.present == nullptr || item.present[row * item.present_stride]);
  }
};

// Losses, the statistics where they are set, and the gradient where that is.
MMK_KERNEL(void, cross_entropy_forward, const CrossEntropyParams&);
// Gradients from the statistics.
MMK_KERNEL(void, cross_entropy_backward, const CrossEntropyParams&);

}  // namespace mmk

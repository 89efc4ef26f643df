// distillation_loss: divergences between the softmaxes of two rows of logits. Torch-free.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

enum class Divergence { forward_kl, reverse_kl, jsd };

// Of a row, float32: maximum of the logits and sum of the exponentials, of student and of teacher; then KL(t‖s), or
// KL(s‖t), or KL(t‖m) and KL(s‖m).
struct DistillationRow {
  float student_top, student_total, teacher_top, teacher_total, first, second;
};

struct DistillationParams {
  const void *student = nullptr, *teacher = nullptr;  // [N][V]
  int64_t student_stride = 0, teacher_stride = 0;
  int64_t rows = 0, classes = 0;
  Dtype dtype = Dtype::f32;
  const uint8_t* ignored = nullptr;  // [N], or null
  float scale = 1.f;                 // 1 / temperature
  Divergence kind = Divergence::forward_kl;
  float beta = 0.5f;
  Workers workers{};

  float* losses = nullptr;                // [N], without T²; 0 where ignored
  DistillationRow* statistics = nullptr;  // [N]

  // [N][V], dense, or null; where the logits are, if those are dense.
  void *grad_student = nullptr, *grad_teacher = nullptr;
  float grad = 0.f;  // of every row's loss, over T
};

// Losses and statistics, and the gradients where they are set.
MMK_KERNEL(void, distillation_loss_forward, const DistillationParams&);
// Gradients from the statistics.
MMK_KERNEL(void, distillation_loss_backward, const DistillationParams&);

}  // namespace mmk

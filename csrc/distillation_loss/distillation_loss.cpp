// distillation_loss on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/distillation_loss):
// student and teacher [N, V], labels [N] integers.
#include "csrc/distillation_loss/distillation_loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/eq.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::distillation_loss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "distillation_loss";
constexpr std::array<std::string_view, 3> kKinds = {"forward_kl", "reverse_kl", "jsd"};
constexpr int64_t kStatistics = sizeof(DistillationRow) / sizeof(float);

std::optional<Divergence> kind_of(std::string_view name) {
  for (size_t i = 0; i < kKinds.size(); ++i) {
    if (kKinds[i] == name) return static_cast<Divergence>(i);
  }
  return std::nullopt;
}

struct Call {
  Tensor ignored;
  DistillationParams params;
  double mean = 1.;  // T² over how many rows count

  Call(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, double temperature,
       std::string_view kind, double beta, int64_t ignore_index) {
    const auto named = kind_of(kind);
    TORCH_CHECK_VALUE(named, kName, ": kind: expected one of forward_kl, reverse_kl, jsd; got ", kind);
    DistillationParams& p = params;
    p.student = student.const_data_ptr();
    p.teacher = teacher.const_data_ptr();
    p.student_stride = row_stride(student);
    p.teacher_stride = row_stride(teacher);
    p.rows = student.size(0);
    p.classes = student.size(1);
    p.dtype = floating_dtype_of(kName, student);
    p.scale = static_cast<float>(1. / temperature);
    p.kind = *named;
    p.beta = static_cast<float>(beta);
    p.workers = torch_workers(50. * static_cast<double>(student.numel()));
    int64_t count = p.rows;
    if (labels) {
      ignored = labels->to(at::kLong).eq(ignore_index).contiguous();
      p.ignored = reinterpret_cast<const uint8_t*>(ignored.const_data_ptr<bool>());
      for (int64_t row = 0; row < p.rows; ++row) count -= p.ignored[row];
    }
    mean = temperature * temperature / static_cast<double>(count > 0 ? count : 1);
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                                   double temperature, std::string_view kind, double beta, int64_t ignore_index,
                                   bool training) {
  Call call(student, teacher, labels, temperature, kind, beta, ignore_index);
  DistillationParams& p = call.params;
  const auto options = student.options().dtype(at::kFloat);
  const Tensor losses = at::cpu::empty({p.rows}, options);
  Tensor statistics = at::cpu::empty({p.rows, kStatistics}, options);
  p.losses = losses.data_ptr<float>();
  p.statistics = static_cast<DistillationRow*>(statistics.data_ptr());
  MMK_DISPATCH(distillation_loss_forward)(p);
  double total = 0.;  // in the order of the rows
  for (int64_t row = 0; row < p.rows; ++row) total += static_cast<double>(p.losses[row]);
  Tensor loss = at::cpu::empty({}, student.options());
  loss.fill_(total * call.mean);
  if (!training) statistics = at::cpu::empty({0}, options);
  return {loss, statistics};
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& student, const Tensor& teacher,
                             const OptionalTensor& labels, double temperature, std::string_view kind, double beta,
                             int64_t ignore_index, at::TensorList saved, const c10::List<bool>& needed) {
  Call call(student, teacher, labels, temperature, kind, beta, ignore_index);
  DistillationParams& p = call.params;
  const Tensor statistics = saved[0].contiguous();
  std::vector<Tensor> results = {empty_if(student, needed[0]), empty_if(teacher, needed[1]),
                                 at::cpu::empty({0}, student.options())};  // of the labels
  p.statistics = static_cast<DistillationRow*>(const_cast<void*>(statistics.const_data_ptr()));
  if (needed[0]) p.grad_student = results[0].data_ptr();
  if (needed[1]) p.grad_teacher = results[1].data_ptr();
  p.grad = static_cast<float>(grads[0].item<double>() * call.mean / temperature);
  if (student.numel() > 0) MMK_DISPATCH(distillation_loss_backward)(p);
  return results;
}

// The losses [N] of rows, 0 where they are ignored; the logits become the gradients of these losses, those of the
// student where `of_student`, those of the teacher where `of_teacher`.
void rows_in_place(const Tensor& student, const Tensor& teacher, const OptionalTensor& ignored, double temperature,
                   std::string_view kind, double beta, bool of_student, bool of_teacher, const Tensor& losses) {
  TORCH_CHECK(student.dim() == 2 && student.is_contiguous() && teacher.is_contiguous() && losses.is_contiguous(),
              "dense rows of logits");
  Call call(student, teacher, ignored, temperature, kind, beta, 1);
  DistillationParams& p = call.params;
  const Tensor statistics = at::cpu::empty({p.rows, kStatistics}, losses.options());
  p.losses = losses.data_ptr<float>();
  p.statistics = static_cast<DistillationRow*>(statistics.data_ptr());
  if (of_student) p.grad_student = student.data_ptr();
  if (of_teacher) p.grad_teacher = teacher.data_ptr();
  p.grad = static_cast<float>(temperature);
  MMK_DISPATCH(distillation_loss_forward)(p);
  losses.mul_(temperature * temperature);
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &student = arguments[0].toTensor(), &teacher = arguments[1].toTensor();
  if (student.dim() != 2 || teacher.sizes() != student.sizes() || !teacher.is_floating_point()) return false;
  if (!arguments[4].isString() || !kind_of(arguments[4].toStringRef())) return false;
  if (arguments[2].isNone()) return true;
  const Tensor& labels = arguments[2].toTensor();
  if (labels.scalar_type() == at::kUInt64) return false;  // int64 does not hold all of them
  return at::isIntegralType(labels.scalar_type(), false) && labels.sizes() == at::IntArrayRef{student.size(0)};
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_distillation_loss_fwd(Tensor student, Tensor teacher, Tensor? labels, float temperature, str kind, float beta, "
      "int ignore_index, bool training) -> (Tensor loss, Tensor statistics)");
  m.def(
      "_distillation_loss_bwd(Tensor[] grads, Tensor student, Tensor teacher, Tensor? labels, float temperature, "
      "str kind, float beta, int ignore_index, Tensor[] saved, bool[] needed) -> Tensor[]");
  m.def(
      "_distillation_rows(Tensor(a!) student, Tensor(b!) teacher, Tensor? ignored, float temperature, str kind, "
      "float beta, bool of_student, bool of_teacher, Tensor(c!) losses) -> ()");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_distillation_loss_fwd", forward);
  m.impl("_distillation_loss_bwd", backward);
  m.impl("_distillation_rows", rows_in_place);
}

}  // namespace
}  // namespace mmk::distillation_loss

// decision_fusion on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/decision_fusion):
// logits M of [B, C], weights [M] or [B, M].
#include "csrc/decision_fusion/decision_fusion.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <vector>

#include "csrc/attention_pool/torch_pool.h"
#include "csrc/door.h"

namespace mmk::decision_fusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "decision_fusion";
constexpr std::array<std::string_view, 5> kMethods = {"mean", "log", "product", "max", "vote"};

std::optional<FusionMethod> method_of(std::string_view name) {
  for (size_t i = 0; i < kMethods.size(); ++i) {
    if (kMethods[i] == name) return static_cast<FusionMethod>(i);
  }
  return std::nullopt;
}

struct Call {
  TorchPool torch;
  Tensor weights;
  DecisionFusionParams params;

  Call(at::TensorList logits, const OptionalTensor& given_weights, std::string_view method,
       const OptionalTensor& presence, double operations)
      : torch(kName, logits, presence, operations) {
    const auto named = method_of(method);
    TORCH_CHECK_VALUE(named, kName, ": method: expected one of mean, log, product, max, vote; got ", method);
    params.method = *named;
    if (given_weights) {
      weights = given_weights->contiguous();
      params.weights = weights.const_data_ptr();
      params.weights_stride = weights.dim() == 2 ? weights.size(1) : 0;
    }
  }
};

Tensor forward(at::TensorList logits, const OptionalTensor& weights, std::string_view method,
               const OptionalTensor& presence, bool) {
  Call call(logits, weights, method, presence, 12.);
  Pool& pool = call.torch.pool;
  const Tensor out = with_huge_pages(at::cpu::empty({pool.rows, pool.width}, logits[0].options()));
  pool.pooled = out.data_ptr();
  call.params.pool = pool;
  if (out.numel() > 0) MMK_DISPATCH(decision_fusion_forward)(call.params);
  return out;
}

std::vector<Tensor> backward(at::TensorList grads, at::TensorList logits, const OptionalTensor& weights,
                             std::string_view method, const OptionalTensor& presence, at::TensorList,
                             const c10::List<bool>& needed) {
  Call call(logits, weights, method, presence, 24.);
  Pool& pool = call.torch.pool;
  const auto options = logits[0].options();
  std::vector<Tensor> results;
  call.torch.set_grads(logits, needed, results);
  const bool wants_weights = weights && needed[logits.size()];
  results.push_back(wants_weights ? at::zeros(weights->sizes(), options) : at::cpu::empty({0}, options));
  results.push_back(at::cpu::empty({0}, options));  // of the presence
  if (grads[0].numel() == 0 || call.params.method == FusionMethod::vote) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  const Tensor by_row = at::cpu::empty({wants_weights ? pool.rows : 0, pool.modalities}, options.dtype(at::kFloat));
  pool.grad_pooled = {grads[0].const_data_ptr(), row_stride(grads[0])};
  call.params.pool = pool;
  if (wants_weights) call.params.grad_weights = by_row.data_ptr<float>();
  MMK_DISPATCH(decision_fusion_backward)(call.params);
  if (!wants_weights) return results;
  if (weights->dim() == 2) {
    results[logits.size()].copy_(by_row);
    return results;
  }
  const Tensor total = at::zeros({pool.modalities}, options.dtype(at::kDouble));  // in the order of the rows
  double* const sums = total.data_ptr<double>();
  const float* row = by_row.const_data_ptr<float>();
  for (int64_t b = 0; b < pool.rows; ++b, row += pool.modalities) {
    for (int64_t i = 0; i < pool.modalities; ++i) sums[i] += row[i];
  }
  results[logits.size()].copy_(total);
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = pool_shape(arguments[0]);
  if (!shape || arguments[0].toTensorVector()[0].dim() != 2 || !arguments[2].isString() ||
      !method_of(arguments[2].toStringRef()))
    return false;
  return (shape->fits(arguments[1], {shape->modalities}) ||
          shape->fits(arguments[1], {shape->rows, shape->modalities})) &&
         shape->presence_fits(arguments[3]);
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_decision_fusion_fwd(Tensor[] logits, Tensor? weights, str method, Tensor? presence, bool training) -> Tensor");
  m.def(
      "_decision_fusion_bwd(Tensor[] grads, Tensor[] logits, Tensor? weights, str method, Tensor? presence, "
      "Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_decision_fusion_fwd", forward);
  m.impl("_decision_fusion_bwd", backward);
}

}  // namespace
}  // namespace mmk::decision_fusion

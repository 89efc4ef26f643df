// tensor_fusion_linear on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/tensor_fusion_linear/tensor_fusion_linear.h"

#include <torch/library.h>

#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::tensor_fusion_linear {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "tensor_fusion_linear";

TensorFusionParams make_params(const std::vector<FusedModality>& modalities, const Tensor& x, const Tensor& weight,
                               std::vector<Tensor>& keep) {
  TensorFusionParams p;
  p.modalities = modalities.data();
  p.count = static_cast<int64_t>(modalities.size());
  p.batch = x.size(0);
  p.outputs = weight.size(0);
  p.features = weight.size(1);
  p.dtype = floating_dtype_of(kName, weight);
  p.weight = matrix_of(weight, keep);
  p.workers =
      torch_workers(static_cast<double>(p.batch) * static_cast<double>(p.outputs) * static_cast<double>(p.features));
  return p;
}

std::vector<FusedModality> modalities_of(const std::vector<Tensor>& xs) {
  std::vector<FusedModality> modalities;
  for (const Tensor& x : xs) modalities.push_back({x.const_data_ptr(), row_stride(x), x.size(1)});
  return modalities;
}

Tensor tensor_fusion_linear_forward(const std::vector<Tensor>& given, const Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& presence, bool) {
  const auto xs = RowPresence(presence, static_cast<int64_t>(given.size())).of(given);
  const auto modalities = modalities_of(xs);
  std::vector<Tensor> keep;
  TensorFusionParams p = make_params(modalities, xs[0], weight, keep);
  const Tensor out = at::cpu::empty({p.batch, p.outputs}, weight.options());
  if (out.numel() == 0) return out;
  if (bias) p.bias = bias->const_data_ptr();
  p.out = out.data_ptr();
  MMK_DISPATCH(tensor_fusion_forward)(p);
  return out;
}

std::vector<Tensor> tensor_fusion_linear_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& given,
                                                  const Tensor& weight, const OptionalTensor& bias,
                                                  const OptionalTensor& presence, const std::vector<Tensor>&,
                                                  const c10::List<bool>& needed) {
  const RowPresence present(presence, static_cast<int64_t>(given.size()));
  const auto xs = present.of(given);
  auto modalities = modalities_of(xs);
  std::vector<Tensor> keep;
  TensorFusionParams p = make_params(modalities, xs[0], weight, keep);
  p.grad_out = grads[0].const_data_ptr();
  p.grad_out_stride = row_stride(grads[0]);
  std::vector<Tensor> results;
  bool any_modality = false;
  for (size_t i = 0; i < xs.size(); ++i) {
    results.push_back(empty_if(xs[i], needed[i]));
    if (needed[i] && xs[i].numel() > 0) {
      modalities[i].grad = results[i].data_ptr();
      any_modality = true;
    }
  }
  const bool weight_needed = needed[xs.size()], bias_needed = bias && needed[xs.size() + 1];
  results.push_back(empty_like_weight(weight, weight_needed));
  results.push_back(bias ? empty_if(*bias, bias_needed) : at::cpu::empty({0}, weight.options()));
  results.push_back(at::cpu::empty({0}, weight.options()));  // presence
  if (p.batch == 0 || p.outputs == 0) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  if (weight_needed) p.grad_weight = results[xs.size()].data_ptr();
  if (bias_needed) p.grad_bias = results[xs.size() + 1].data_ptr();
  if (any_modality) MMK_DISPATCH(tensor_fusion_grad_features)(p);
  if (weight_needed || bias_needed) MMK_DISPATCH(tensor_fusion_grad_weight)(p);
  for (size_t i = 0; i < xs.size(); ++i) present.clear(results[i], static_cast<int64_t>(i));
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto xs = arguments[0].toListRef();
  const Tensor& weight = arguments[1].toTensor();
  if (xs.empty() || weight.dim() != 2 || !arguments[3].isNone()) return false;
  int64_t features = 1;
  for (const c10::IValue& value : xs) {
    const Tensor& x = value.toTensor();
    if (x.dim() != 2 || x.size(0) != xs[0].toTensor().size(0) || x.scalar_type() != weight.scalar_type()) return false;
    if (__builtin_mul_overflow(features, x.size(1) + 1, &features)) return false;
  }
  const auto fits_bias = [&](const Tensor& bias) {
    return bias.scalar_type() == weight.scalar_type() && bias.dim() == 1 && bias.size(0) == weight.size(0);
  };
  return weight.size(1) == features && (arguments[2].isNone() || fits_bias(arguments[2].toTensor()));
}

const DoorCheck door_check(kName, fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_tensor_fusion_linear_fwd(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? presence, bool training) -> "
      "Tensor out");
  m.def(
      "_tensor_fusion_linear_bwd(Tensor[] grads, Tensor[] xs, Tensor weight, Tensor? bias, Tensor? presence, "
      "Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_tensor_fusion_linear_fwd", tensor_fusion_linear_forward);
  m.impl("_tensor_fusion_linear_bwd", tensor_fusion_linear_backward);
}

}  // namespace mmk::tensor_fusion_linear

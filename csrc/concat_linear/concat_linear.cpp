// concat_linear on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/concat_linear).
#include "csrc/concat_linear/concat_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/concat/torch_sources.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::concat_linear {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Name = std::optional<std::string_view>;

// What both passes are given. The views point into the tensors and into `sources`.
struct Call {
  TorchSources sources;
  std::vector<Tensor> keep;
  ConcatLinearParams params;

  Call(at::TensorList xs, const Tensor& weight, const OptionalTensor& bias, const Name& activation,
       const OptionalTensor& presence, const OptionalTensor& residual, const OptionalTensor& gate, double products)
      : sources("concat_linear", xs, presence) {
    ConcatLinearParams& p = params;
    sources.set_weight(weight);
    p.sources = sources.view(weight.size(0));
    if (bias) p.bias = bias->const_data_ptr();
    if (gate) {
      p.gate = gate->const_data_ptr();
      p.gate_stride = gate->dim() == 0 ? 0 : 1;
    }
    if (residual) p.residual = row_view(*residual, keep);
    p.activation = activation_of(activation);
    p.workers = torch_workers(products * static_cast<double>(p.sources.rows) * static_cast<double>(p.sources.features) *
                              static_cast<double>(p.sources.columns + 16));
  }
};

std::tuple<Tensor, Tensor> concat_linear_forward(at::TensorList xs, const Tensor& weight, const OptionalTensor& bias,
                                                 Name activation, const OptionalTensor& presence,
                                                 const OptionalTensor& residual, const OptionalTensor& gate,
                                                 bool training) {
  Call call(xs, weight, bias, activation, presence, residual, gate, 2.);
  ConcatLinearParams& p = call.params;
  const Tensor out = with_huge_pages(at::cpu::empty(output_sizes(xs, weight.size(0)), weight.options()));
  const bool from_output = derives_from_output(p.activation) && !gate && (!residual || !activation);
  const bool keeps = training && !from_output;
  const Tensor z = empty_if(out, keeps);
  p.out = out.data_ptr();
  if (keeps) p.preactivation = z.data_ptr();
  if (out.numel() > 0) MMK_DISPATCH(concat_linear_forward)(p);
  return {out, z};
}

std::vector<Tensor> concat_linear_backward(at::TensorList grads, at::TensorList xs, const Tensor& weight,
                                           const OptionalTensor& bias, Name activation, const OptionalTensor& presence,
                                           const OptionalTensor& residual, const OptionalTensor& gate,
                                           at::TensorList given_saved, const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(xs, weight, bias, activation, presence, residual, gate, 4.);
  ConcatLinearParams& p = call.params;
  const size_t count = xs.size();
  const auto wanted = [&](size_t i) { return static_cast<bool>(needed[i]); };
  std::vector<Tensor> result;
  for (size_t i = 0; i < count; ++i) {  // a modality that is absent everywhere has no item to write its zeros
    const bool dropped = wanted(i) && presence && presence->dim() == 1;
    result.push_back(dropped ? at::zeros(xs[i].sizes(), xs[i].options()) : empty_if(xs[i], wanted(i)));
  }
  result.push_back(empty_like_weight(weight, wanted(count)));
  result.push_back(empty_if(bias ? *bias : weight, wanted(count + 1)));
  result.push_back(at::cpu::empty({0}, weight.options()));  // presence
  result.push_back(empty_if(residual ? *residual : weight, wanted(count + 3)));
  result.push_back(empty_if(gate ? *gate : weight, wanted(count + 4)));

  if (wanted(count + 3)) result[count + 3].copy_(grads[0]);
  if (p.sources.rows == 0 || p.sources.features == 0) {
    for (Tensor& t : result) t.zero_();
    return result;
  }
  call.sources.set_grads(result, needed);
  if (wanted(count)) {
    if (call.sources.items.size() < count) result[count].zero_();  // columns of modalities that are absent everywhere
    call.sources.set_weight_grad(result[count]);
  }
  if (wanted(count + 1)) p.grad_bias = result[count + 1].data_ptr();
  Tensor gate_sums;
  if (wanted(count + 4)) {
    gate_sums = at::cpu::empty({p.sources.features}, weight.options().dtype(at::kFloat));
    p.grad_gate = gate_sums.data_ptr<float>();
  }
  p.grad_out = row_view(grads[0], call.keep);
  // Saved are the output, where the op's table keeps it, and z.
  if (saved.size() == 2) p.out = saved[0].data_ptr();
  if (saved.back().numel() > 0) p.preactivation = saved.back().data_ptr();
  MMK_DISPATCH(concat_linear_backward)(p);
  if (wanted(count + 4)) {
    result[count + 4].copy_(gate->dim() == 0 ? gate_sums.sum() : gate_sums);
  }
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = shared_shape(arguments[0].toTensorList());
  const Tensor& weight = arguments[1].toTensor();
  if (!shape || weight.dim() != 2) return false;
  const int64_t features = weight.size(0);
  const auto is_scalar = [&](const Tensor& t) { return t.dim() == 0 && t.scalar_type() == shape->dtype; };
  return shape->fits(arguments[1], {features}, shape->width) && shape->fits(arguments[2], {}, features) &&
         (arguments[3].isNone() || is_activation(arguments[3].toStringRef())) &&
         presence_fits(arguments[4], *shape, arguments[0].toListRef().size()) &&
         shape->fits(arguments[5], shape->lead, features) &&
         (shape->fits(arguments[6], {}, features) || is_scalar(arguments[6].toTensor()));
}

const DoorCheck door_check("concat_linear", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_concat_linear_fwd(Tensor[] xs, Tensor weight, Tensor? bias, str? activation, Tensor? presence, "
      "Tensor? residual, Tensor? gate, bool training) -> (Tensor out, Tensor preactivation)");
  m.def(
      "_concat_linear_bwd(Tensor[] grads, Tensor[] xs, Tensor weight, Tensor? bias, str? activation, "
      "Tensor? presence, Tensor? residual, Tensor? gate, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_concat_linear_fwd", concat_linear_forward);
  m.impl("_concat_linear_bwd", concat_linear_backward);
}

}  // namespace mmk::concat_linear

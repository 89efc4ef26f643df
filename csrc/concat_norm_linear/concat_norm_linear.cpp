// concat_norm_linear on the CPU, as torch sees it. Arguments were checked at the door
// (mmkernels/ops/concat_norm_linear).
#include "csrc/concat_norm_linear/concat_norm_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/concat/torch_sources.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::concat_norm_linear {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Name = std::optional<std::string_view>;

struct Call {
  TorchSources sources;
  std::vector<Tensor> keep;
  ConcatNormLinearParams params;

  Call(at::TensorList xs, const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& weight,
       const OptionalTensor& bias, std::string_view norm, double eps, const Name& activation, double products)
      : sources("concat_norm_linear", xs, {}) {
    ConcatNormLinearParams& p = params;
    sources.set_weight(weight);
    p.linear.sources = sources.view(weight.size(0));
    p.norm_weight = norm_weight.const_data_ptr();
    if (norm_bias) p.norm_bias = norm_bias->const_data_ptr();
    if (bias) p.linear.bias = bias->const_data_ptr();
    p.linear.activation = activation_of(activation);
    p.rms = norm == "rms";
    p.eps = static_cast<float>(eps);
    const ConcatSources& s = p.linear.sources;
    p.linear.workers = torch_workers(products * static_cast<double>(s.rows) * static_cast<double>(s.features) *
                                     static_cast<double>(s.columns + 16));
  }
};

std::tuple<Tensor, Tensor, Tensor> concat_norm_linear_forward(at::TensorList xs, const Tensor& norm_weight,
                                                              const OptionalTensor& norm_bias, const Tensor& weight,
                                                              const OptionalTensor& bias, std::string_view norm,
                                                              double eps, Name activation, bool training) {
  Call call(xs, norm_weight, norm_bias, weight, bias, norm, eps, activation, 2.);
  ConcatNormLinearParams& p = call.params;
  const Tensor out = with_huge_pages(at::cpu::empty(output_sizes(xs, weight.size(0)), weight.options()));
  const bool keeps = training && activation;
  const Tensor z = empty_if(out, keeps);
  const auto rows = p.linear.sources.rows;
  const auto options = out.options().dtype(at::kFloat);
  const Tensor statistics = training ? at::cpu::empty({rows, 2}, options) : at::cpu::empty({0}, options);
  p.linear.out = out.data_ptr();
  if (keeps) p.linear.preactivation = z.data_ptr();
  if (training) p.statistics = statistics.data_ptr<float>();
  if (out.numel() > 0 || statistics.numel() > 0) MMK_DISPATCH(concat_norm_linear_forward)(p);
  return {out, z, statistics};
}

std::vector<Tensor> concat_norm_linear_backward(at::TensorList grads, at::TensorList xs, const Tensor& norm_weight,
                                                const OptionalTensor& norm_bias, const Tensor& weight,
                                                const OptionalTensor& bias, std::string_view norm, double eps,
                                                Name activation, at::TensorList given_saved,
                                                const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(xs, norm_weight, norm_bias, weight, bias, norm, eps, activation, 4.);
  ConcatNormLinearParams& p = call.params;
  const size_t count = xs.size();
  std::vector<Tensor> result;
  for (size_t i = 0; i < count; ++i) result.push_back(empty_if(xs[i], needed[i]));
  result.push_back(empty_if(norm_weight, needed[count]));
  result.push_back(empty_if(norm_bias ? *norm_bias : weight, needed[count + 1]));
  result.push_back(empty_like_weight(weight, needed[count + 2]));
  result.push_back(empty_if(bias ? *bias : weight, needed[count + 3]));
  if (p.linear.sources.rows == 0 || p.linear.sources.features == 0) {
    for (Tensor& t : result) t.zero_();
    return result;
  }
  call.sources.set_grads(result, needed);
  const auto data_of = [&](size_t i) { return needed[i] ? result[i].data_ptr() : nullptr; };
  p.grad_norm_weight = data_of(count);
  p.grad_norm_bias = data_of(count + 1);
  p.grad_weight = data_of(count + 2);
  if (needed[count + 2]) call.sources.set_weight_grad(result[count + 2]);
  p.linear.grad_bias = data_of(count + 3);
  p.linear.grad_out = row_view(grads[0], call.keep);
  // Saved are the output, where it is z, then z, then the statistics.
  const Tensor& z = activation ? saved[saved.size() - 2] : saved[0];
  p.linear.preactivation = z.data_ptr();
  p.statistics = saved.back().data_ptr<float>();
  MMK_DISPATCH(concat_norm_linear_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = shared_shape(arguments[0].toTensorList());
  const Tensor& weight = arguments[3].toTensor();
  if (!shape || weight.dim() != 2) return false;
  const int64_t features = weight.size(0);
  return shape->fits(arguments[1], {}, shape->width) && shape->fits(arguments[2], {}, shape->width) &&
         shape->fits(arguments[3], {features}, shape->width) && shape->fits(arguments[4], {}, features) &&
         arguments[5].isString() && (arguments[5].toStringRef() == "layer" || arguments[5].toStringRef() == "rms") &&
         arguments[6].toDouble() >= 0. && (arguments[7].isNone() || is_activation(arguments[7].toStringRef()));
}

const DoorCheck door_check("concat_norm_linear", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_concat_norm_linear_fwd(Tensor[] xs, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, "
      "str norm, float eps, str? activation, bool training) -> (Tensor out, Tensor preactivation, Tensor statistics)");
  m.def(
      "_concat_norm_linear_bwd(Tensor[] grads, Tensor[] xs, Tensor norm_weight, Tensor? norm_bias, Tensor weight, "
      "Tensor? bias, str norm, float eps, str? activation, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_concat_norm_linear_fwd", concat_norm_linear_forward);
  m.impl("_concat_norm_linear_bwd", concat_norm_linear_backward);
}

}  // namespace mmk::concat_norm_linear

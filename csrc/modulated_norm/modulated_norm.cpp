// modulated_norm on the CPU, as torch sees it. Arguments were checked at the door: x is [B, L, C], shift and scale are
// both [B, C], both [B, 1, C] or both [B, L, C].
#include "csrc/modulated_norm/modulated_norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "csrc/cpu/large_output.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"
#include "csrc/norm/torch_rows.h"

namespace mmk::modulated_norm {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kName = "modulated_norm";

// Shift, scale or a gradient of theirs, [B, C] or per token.
TokenRows modulation_rows(const Tensor& t) {
  if (t.dim() == 3) return token_rows(t);
  check_dense_rows(t, 2);
  return {t.data_ptr(), t.stride(0), 0};
}

bool is_per_token(const Tensor& t, int64_t length) { return t.dim() == 3 && t.size(1) == length && length != 1; }

ModulatedNormParams make_params(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                std::optional<std::string_view> norm, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, double operations) {
  ModulatedNormParams p;
  p.batch = x.size(0);
  p.length = x.size(1);
  p.features = x.size(2);
  p.dtype = row_dtype(kName, x);
  p.norm = norm_named(kName, norm);
  p.eps = static_cast<float>(eps);
  p.x = token_rows(x);
  p.shift = modulation_rows(shift);
  p.scale = modulation_rows(scale);
  p.per_token = is_per_token(shift, p.length) && is_per_token(scale, p.length);
  p.weight = vector_data(weight);
  p.bias = vector_data(bias);
  p.stream = worth_streaming(static_cast<int64_t>(x.nbytes()));
  p.workers = torch_workers(operations * static_cast<double>(x.numel()));
  return p;
}

Tensor forward(const Tensor& x, const Tensor& shift, const Tensor& scale, std::optional<std::string_view> norm,
               const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool) {
  const Tensor out = with_huge_pages(at::cpu::empty(x.sizes(), x.options()));
  if (x.numel() == 0) return out;
  ModulatedNormParams p = make_params(x, shift, scale, norm, weight, bias, eps, 10.);
  p.out = token_rows(out);
  MMK_DISPATCH(modulated_norm_forward)(p);
  return out;
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& x, const Tensor& shift, const Tensor& scale,
                             std::optional<std::string_view> norm, const OptionalTensor& weight,
                             const OptionalTensor& bias, double eps, at::TensorList, c10::List<bool> needed) {
  const auto gradient = [&](size_t i, const Tensor& like) { return empty_gradient(needed[i], like, grads[0]); };
  const Tensor dx = with_huge_pages(gradient(0, x)), dshift = gradient(1, shift), dscale = gradient(2, scale);
  const Tensor dweight = gradient(3, weight.value_or(x)), dbias = gradient(4, bias.value_or(x));
  std::vector<Tensor> result{dx, dshift, dscale, dweight, dbias};
  if (x.numel() == 0) {
    for (const Tensor& t : result) t.zero_();
    return result;
  }
  ModulatedNormParams p = make_params(x, shift, scale, norm, weight, bias, eps, 20.);
  p.grad_out = token_rows(grads[0]);
  if (needed[0]) p.grad_x = token_rows(dx);
  if (needed[1]) p.grad_shift = modulation_rows(dshift);
  if (needed[2]) p.grad_scale = modulation_rows(dscale);
  if (needed[3]) p.grad_weight = dweight.data_ptr();
  if (needed[4]) p.grad_bias = dbias.data_ptr();
  MMK_DISPATCH(modulated_norm_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &x = arguments[0].toTensor(), &shift = arguments[1].toTensor(), &scale = arguments[2].toTensor();
  if (x.dim() != 3 || shift.sizes() != scale.sizes()) return false;
  const int64_t batch = x.size(0), length = x.size(1), features = x.size(2);
  const bool modulates = shift.dim() == 2 || (shift.dim() == 3 && (shift.size(1) == 1 || shift.size(1) == length));
  if (!modulates || shift.size(0) != batch || shift.size(-1) != features) return false;
  if (shift.scalar_type() != x.scalar_type() || scale.scalar_type() != x.scalar_type()) return false;
  const auto is_vector = [&](const c10::IValue& argument) {
    if (argument.isNone()) return true;
    const Tensor& t = argument.toTensor();
    return t.scalar_type() == x.scalar_type() && t.dim() == 1 && t.size(0) == features;
  };
  if (arguments[3].isNone()) return arguments[4].isNone() && arguments[5].isNone();
  const auto& norm = arguments[3].toStringRef();
  return (norm == "layer" || norm == "rms") && is_vector(arguments[4]) && is_vector(arguments[5]) &&
         std::isfinite(arguments[6].toDouble()) && arguments[6].toDouble() >= 0.;
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_modulated_norm_fwd(Tensor x, Tensor shift, Tensor scale, str? norm, Tensor? norm_weight, Tensor? norm_bias, "
      "float eps, bool training) -> Tensor");
  m.def(
      "_modulated_norm_bwd(Tensor[] grads, Tensor x, Tensor shift, Tensor scale, str? norm, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_modulated_norm_fwd", forward);
  m.impl("_modulated_norm_bwd", backward);
}

}  // namespace
}  // namespace mmk::modulated_norm

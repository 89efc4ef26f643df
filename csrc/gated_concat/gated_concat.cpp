// gated_concat on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/gated_concat).
#include "csrc/gated_concat/gated_concat.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "csrc/concat/torch_sources.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::gated_concat {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call {
  std::array<Tensor, 2> xs;
  TorchSources sources;
  std::vector<Tensor> keep;
  GatedConcatParams params;

  Call(const Tensor& x, const Tensor& y, const Tensor& weight, const OptionalTensor& bias, double products)
      : xs{x, y}, sources("gated_concat", xs, {}) {
    GatedConcatParams& p = params;
    sources.set_weight(weight);
    p.sources = sources.view(weight.size(0));
    p.x = row_view(x, keep);
    p.y = row_view(y, keep);
    p.x_width = x.size(-1);
    p.y_width = y.size(-1);
    for (size_t s = 0; s < sources.index.size(); ++s) {
      (sources.index[s] == 0 ? p.x_item : p.y_item) = static_cast<int64_t>(s);
    }
    if (bias) p.bias = bias->const_data_ptr();
    p.workers = torch_workers(products * static_cast<double>(p.sources.rows) * static_cast<double>(p.sources.features) *
                              static_cast<double>(p.sources.columns + 16));
  }
};

std::tuple<Tensor, Tensor> gated_concat_forward(const Tensor& x, const Tensor& y, const Tensor& weight,
                                                const OptionalTensor& bias, bool training) {
  Call call(x, y, weight, bias, 2.);
  GatedConcatParams& p = call.params;
  const Tensor out = at::cpu::empty(output_sizes(call.xs, p.x_width + p.y_width + 1), x.options());
  const Tensor gate = at::cpu::empty({p.sources.rows, p.sources.features}, x.options());
  p.out = out.data_ptr();
  p.gate = gate.data_ptr();
  if (out.numel() > 0) MMK_DISPATCH(gated_concat_forward)(p);
  return {out, training ? gate : at::cpu::empty({0}, x.options())};
}

std::vector<Tensor> gated_concat_backward(at::TensorList grads, const Tensor& x, const Tensor& y, const Tensor& weight,
                                          const OptionalTensor& bias, at::TensorList given_saved,
                                          const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(x, y, weight, bias, 4.);
  GatedConcatParams& p = call.params;
  const Tensor grad_weight = empty_like_weight(weight, needed[2]);
  std::vector<Tensor> result{empty_if(x, needed[0]), empty_if(y, needed[1]), grad_weight,
                             empty_if(bias ? *bias : weight, needed[3])};
  if (p.sources.rows == 0) {
    for (Tensor& t : result) t.zero_();
    return result;
  }
  call.sources.set_grads(result, needed);
  if (needed[2]) call.sources.set_weight_grad(grad_weight);
  if (needed[3]) p.grad_bias = result[3].data_ptr();
  p.grad_out = row_view(grads[0], call.keep);
  p.gate = saved[0].data_ptr();
  MMK_DISPATCH(gated_concat_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &x = arguments[0].toTensor(), &y = arguments[1].toTensor(), &weight = arguments[2].toTensor();
  if (x.dim() == 0 || weight.dim() != 2) return false;
  const auto lead = x.sizes().slice(0, static_cast<size_t>(x.dim() - 1));
  const auto dtype = x.scalar_type();
  const int64_t gates = weight.size(0);
  return y.dim() == x.dim() && SharedShape::fits(y, dtype, lead, y.size(-1)) && (gates == 1 || gates == x.size(-1)) &&
         SharedShape::fits(weight, dtype, {gates}, x.size(-1) + y.size(-1)) &&
         (arguments[3].isNone() || SharedShape::fits(arguments[3].toTensor(), dtype, {}, gates));
}

const DoorCheck door_check("gated_concat", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_gated_concat_fwd(Tensor x, Tensor y, Tensor weight, Tensor? bias, bool training) -> (Tensor out, Tensor gate)");
  m.def(
      "_gated_concat_bwd(Tensor[] grads, Tensor x, Tensor y, Tensor weight, Tensor? bias, Tensor[] saved, "
      "bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_gated_concat_fwd", gated_concat_forward);
  m.impl("_gated_concat_bwd", gated_concat_backward);
}

}  // namespace mmk::gated_concat

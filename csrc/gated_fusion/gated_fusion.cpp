// gated_fusion on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/gated_fusion).
#include "csrc/gated_fusion/gated_fusion.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/concat/torch_sources.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::gated_fusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call {
  TorchSources sources;
  std::vector<ConcatTerm> terms;  // two for each source: values, gates
  std::vector<Tensor> keep;
  std::vector<const void*> biases;
  GatedFusionParams params;

  Call(at::TensorList xs, at::TensorList value_weights, at::TensorList value_biases, const Tensor& gate_weight,
       const OptionalTensor& gate_bias, const OptionalTensor& presence, double products)
      : sources("gated_fusion", xs, presence) {
    GatedFusionParams& p = params;
    p.modalities = static_cast<int64_t>(xs.size());
    p.features = value_weights[0].size(0);
    p.sigmoid = p.modalities == 2 && gate_weight.size(0) == p.features;
    terms.resize(2 * sources.items.size());
    const Matrix gates = matrix_of(gate_weight, keep);
    for (size_t s = 0; s < sources.items.size(); ++s) {
      const int64_t i = sources.index[s];
      ConcatTerm* pair = &terms[2 * s];
      const Tensor& value_weight = value_weights[static_cast<size_t>(i)];
      pair[0] = column_term(matrix_of(value_weight, keep), value_weight, 0);
      pair[0].column = i * p.features;
      pair[1] = column_term(gates, gate_weight, sources.items[s].column);
      pair[1].column = p.modalities * p.features;
      sources.items[s].terms = pair;
      sources.items[s].term_count = 2;
    }
    p.sources = sources.view(p.modalities * p.features + gate_weight.size(0));
    for (const Tensor& bias : value_biases) biases.push_back(bias.const_data_ptr());
    if (!biases.empty()) p.value_biases = biases.data();
    if (gate_bias) p.gate_bias = gate_bias->const_data_ptr();
    if (presence) {
      keep.push_back(presence->contiguous());
      p.present = reinterpret_cast<const uint8_t*>(keep.back().const_data_ptr<bool>());
      p.present_stride = presence->dim() > 1 ? p.modalities : 0;
    }
    p.workers = torch_workers(products * static_cast<double>(p.sources.rows) * static_cast<double>(p.sources.features) *
                              static_cast<double>(p.sources.columns + 16));
  }
};

std::tuple<Tensor, Tensor, Tensor> gated_fusion_forward(at::TensorList xs, at::TensorList value_weights,
                                                        at::TensorList value_biases, const Tensor& gate_weight,
                                                        const OptionalTensor& gate_bias, const OptionalTensor& presence,
                                                        bool training) {
  Call call(xs, value_weights, value_biases, gate_weight, gate_bias, presence, 2.);
  GatedFusionParams& p = call.params;
  const auto options = gate_weight.options();
  const Tensor out = at::cpu::empty(output_sizes(xs, p.features), options);
  const int64_t rows = training ? p.sources.rows : 0;
  const Tensor values =
      training ? at::cpu::empty({rows, p.modalities * p.features}, options) : at::cpu::empty({0}, options);
  const Tensor weights = at::cpu::empty(values.sizes(), options);
  p.out = out.data_ptr();
  if (training) {
    p.values = values.data_ptr();
    p.weights = weights.data_ptr();
  }
  if (out.numel() > 0) MMK_DISPATCH(gated_fusion_forward)(p);
  return {out, values, weights};
}

std::vector<Tensor> gated_fusion_backward(at::TensorList grads, at::TensorList xs, at::TensorList value_weights,
                                          at::TensorList value_biases, const Tensor& gate_weight,
                                          const OptionalTensor& gate_bias, const OptionalTensor& presence,
                                          at::TensorList given_saved, const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(xs, value_weights, value_biases, gate_weight, gate_bias, presence, 4.);
  GatedFusionParams& p = call.params;
  const size_t count = xs.size(), biases = value_biases.size(), gate = 2 * count + biases;
  std::vector<Tensor> result;
  // Where a source has no row to read, nothing writes its gradient and those of its weights.
  std::vector<bool> dropped(count, true);
  for (const int64_t i : call.sources.index) dropped[static_cast<size_t>(i)] = false;
  const auto add = [&](const Tensor& like, bool zero) {
    const bool wanted = needed[result.size()];
    result.push_back(empty_like_weight(like, wanted));
    if (wanted && zero) result.back().zero_();
  };
  for (size_t i = 0; i < count; ++i) {
    result.push_back(empty_if(xs[i], needed[i]));
    if (needed[i] && dropped[i]) result.back().zero_();
  }
  for (size_t i = 0; i < count; ++i) add(value_weights[i], dropped[i]);
  for (size_t i = 0; i < biases; ++i) add(value_biases[i], false);
  add(gate_weight, call.sources.items.size() < count);
  add(gate_bias ? *gate_bias : gate_weight, false);
  result.push_back(at::cpu::empty({0}, gate_weight.options()));  // presence
  if (p.sources.rows == 0 || p.features == 0) {
    for (Tensor& t : result) t.zero_();
    return result;
  }
  call.sources.set_grads(result, needed);
  for (size_t s = 0; s < call.sources.items.size(); ++s) {
    const auto i = static_cast<size_t>(call.sources.index[s]);
    if (needed[count + i]) set_grad(call.terms[2 * s], result[count + i], 0);
    if (needed[gate]) set_grad(call.terms[2 * s + 1], result[gate], call.sources.items[s].column);
  }
  std::vector<void*> grad_biases;
  for (size_t i = 0; i < biases; ++i) {
    grad_biases.push_back(needed[2 * count + i] ? result[2 * count + i].data_ptr() : nullptr);
  }
  if (biases > 0) p.grad_value_biases = grad_biases.data();
  if (needed[gate + 1]) p.grad_gate_bias = result[gate + 1].data_ptr();
  p.grad_out = row_view(grads[0], call.keep);
  p.values = saved[0].data_ptr();
  p.weights = saved[1].data_ptr();
  MMK_DISPATCH(gated_fusion_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = shared_shape(arguments[0].toTensorList());
  const auto value_weights = arguments[1].toListRef(), value_biases = arguments[2].toListRef();
  const Tensor& gate_weight = arguments[3].toTensor();
  if (!shape || gate_weight.dim() != 2 || value_weights.empty() || value_weights[0].toTensor().dim() != 2) return false;
  const auto count = static_cast<int64_t>(arguments[0].toListRef().size());
  const int64_t features = value_weights[0].toTensor().size(0), gates = gate_weight.size(0);
  const std::vector<int64_t> rows{features}, none;
  const auto weight = [&](int64_t width) { return std::pair{at::IntArrayRef(rows), width}; };
  const auto bias = [&](int64_t) { return std::pair{at::IntArrayRef(none), features}; };
  return fits_each(arguments[1], arguments[0], *shape, weight) &&
         (value_biases.empty() || fits_each(arguments[2], arguments[0], *shape, bias)) &&
         (gates == count * features || (count == 2 && gates == features)) &&
         shape->fits(arguments[3], {gates}, shape->width) && shape->fits(arguments[4], {}, gates) &&
         presence_fits(arguments[5], *shape, arguments[0].toListRef().size());
}

const DoorCheck door_check("gated_fusion", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_gated_fusion_fwd(Tensor[] xs, Tensor[] value_weights, Tensor[] value_biases, Tensor gate_weight, "
      "Tensor? gate_bias, Tensor? presence, bool training) -> (Tensor out, Tensor values, Tensor weights)");
  m.def(
      "_gated_fusion_bwd(Tensor[] grads, Tensor[] xs, Tensor[] value_weights, Tensor[] value_biases, "
      "Tensor gate_weight, Tensor? gate_bias, Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_gated_fusion_fwd", gated_fusion_forward);
  m.impl("_gated_fusion_bwd", gated_fusion_backward);
}

}  // namespace mmk::gated_fusion

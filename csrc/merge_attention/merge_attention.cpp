// merge_attention on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/merge_attention):
// outputs [*, D] of one shape, lses [*] float32.
#include "csrc/merge_attention/merge_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::merge_attention {
namespace {

using at::Tensor;

// Leading dims in the order of a tensor's memory: tensors of that layout are rows of dense memory.
class Order {
 public:
  explicit Order(const Tensor& t) : dims_(order_of(t)) {}
  Tensor view(const Tensor& t) const {
    std::vector<int64_t> dims(dims_.begin(), dims_.end());
    if (t.dim() > static_cast<int64_t>(dims.size())) dims.push_back(t.dim() - 1);
    return t.permute(dims);
  }
  Tensor rows(const Tensor& t) const { return view(t).contiguous(); }

 private:
  at::DimVector dims_;
};

// A result, and its rows, which are a copy where it has another layout.
struct Result {
  Tensor tensor, rows;

  Result(const Order& order, const Tensor& like, bool wanted)
      : tensor(wanted ? empty_in_order_of(like, like.sizes()) : at::cpu::empty({0}, like.options())) {
    if (wanted) rows = order.rows(tensor);
  }
  void* data() const { return rows.defined() ? rows.data_ptr() : nullptr; }
  Tensor finished(const Order& order) const {
    if (rows.defined() && !rows.is_alias_of(tensor)) order.view(tensor).copy_(rows);
    return tensor;
  }
};

struct Call {
  Order order;
  std::vector<Tensor> outs, lses;
  std::vector<MergePart> parts;
  MergeAttentionParams params;

  Call(at::TensorList outputs, at::TensorList given_lses, double operations) : order(outputs[0]) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      outs.push_back(order.rows(outputs[i]));
      lses.push_back(order.rows(given_lses[i]));
      parts.push_back({outs[i].const_data_ptr(), lses[i].const_data_ptr<float>()});
    }
    params.rows = lses[0].numel();
    params.features = outs[0].size(-1);
    params.parts = static_cast<int64_t>(parts.size());
    params.dtype = floating_dtype_of("merge_attention", outs[0]);
    params.part = parts.data();
    params.workers = torch_workers(operations * static_cast<double>(params.parts * outs[0].numel()));
  }
};

std::tuple<Tensor, Tensor> forward(at::TensorList outputs, at::TensorList lses, bool) {
  Call call(outputs, lses, 2.);
  const Result out(call.order, outputs[0], true);
  const Result lse(call.order, lses[0], true);
  call.params.out = out.data();
  call.params.lse = static_cast<float*>(lse.data());
  MMK_DISPATCH(merge_attention_forward)(call.params);
  return {out.finished(call.order), lse.finished(call.order)};
}

std::vector<Tensor> backward(at::TensorList grads, at::TensorList outputs, at::TensorList lses, at::TensorList,
                             const c10::List<bool>& needed) {
  Call call(outputs, lses, 4.);
  const Tensor grad_out = call.order.rows(grads[0]), grad_lse = call.order.rows(grads[1]);
  call.params.grad_out = grad_out.const_data_ptr();
  call.params.grad_lse = grad_lse.const_data_ptr<float>();
  const size_t count = outputs.size();
  std::vector<Result> results;
  for (size_t i = 0; i < count; ++i) {
    results.emplace_back(call.order, outputs[i], needed[i]);
    call.parts[i].grad_out = results.back().data();
  }
  for (size_t i = 0; i < count; ++i) {
    results.emplace_back(call.order, lses[i], needed[count + i]);
    call.parts[i].grad_lse = static_cast<float*>(results.back().data());
  }
  MMK_DISPATCH(merge_attention_backward)(call.params);
  std::vector<Tensor> pulled;
  for (const Result& result : results) pulled.push_back(result.finished(call.order));
  return pulled;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto outputs = arguments[0].toListRef(), lses = arguments[1].toListRef();
  if (outputs.empty() || lses.size() != outputs.size()) return false;
  const Tensor& first = outputs[0].toTensor();
  if (first.dim() < 2) return false;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Tensor &output = outputs[i].toTensor(), &lse = lses[i].toTensor();
    if (output.scalar_type() != first.scalar_type() || output.sizes() != first.sizes()) return false;
    if (lse.scalar_type() != at::kFloat || lse.sizes() != first.sizes().slice(0, first.sizes().size() - 1))
      return false;
  }
  return true;
}

const DoorCheck door_check("merge_attention", fits, DoorCheck::Dtypes::any);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def("_merge_attention_fwd(Tensor[] outputs, Tensor[] lses, bool training) -> (Tensor out, Tensor lse)");
  m.def(
      "_merge_attention_bwd(Tensor[] grads, Tensor[] outputs, Tensor[] lses, Tensor[] saved, bool[] needed) "
      "-> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_merge_attention_fwd", forward);
  m.impl("_merge_attention_bwd", backward);
}

}  // namespace
}  // namespace mmk::merge_attention

// split_attention_pool on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/attention_pool/split_attention_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/attention_pool/torch_linear.h"
#include "csrc/attention_pool/torch_pool.h"
#include "csrc/door.h"

namespace mmk::split_attention_pool {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Name = std::optional<std::string_view>;

constexpr const char* kName = "split_attention_pool";

void* data_or_null(const Tensor& t, bool wanted) { return wanted ? t.data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> split_attention_pool_forward(
    at::TensorList xs, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
    Name activation, const OptionalTensor& presence, bool training) {
  TorchPool torch(kName, xs, presence, 4.);
  const Pool& pool = torch.pool;
  const auto options = weight1.options();
  const int64_t hidden = weight1.size(0);
  const auto fresh = [&](at::IntArrayRef sizes) { return with_huge_pages(at::cpu::empty(sizes, options)); };
  const Tensor pooled = fresh({pool.rows, pool.width}), weights = fresh({pool.rows, pool.modalities, pool.width});
  const Tensor sum = at::cpu::empty({pool.rows, pool.width}, options), z = at::cpu::empty({pool.rows, hidden}, options);
  const Activation act = activation_of(activation);
  const Tensor preactivation = empty_if(z, training && !derives_from_output(act));
  if (pool.rows > 0) {
    torch.set_outputs(pooled, weights);
    const SplitPoolParams p{pool, sum.data_ptr(), nullptr};
    MMK_DISPATCH(split_pool_sum)(p);
    TorchLinear first(kName, pool.rows, weight1, 2.), second(kName, pool.rows, weight2, 2.);
    first.set_input(sum.const_data_ptr(), pool.width);
    first.params.bias = bias1.const_data_ptr();
    first.params.activation = act;
    first.params.out = z.data_ptr();
    first.params.preactivation = data_or_null(preactivation, preactivation.numel() > 0);
    first.forward();
    second.set_input(z.const_data_ptr(), hidden);
    second.params.bias = bias2.const_data_ptr();
    second.params.out = weights.data_ptr();
    second.forward();
    MMK_DISPATCH(split_pool_forward)(p);
  }
  if (training) return {pooled, weights, sum, z, preactivation};
  return {pooled, weights, at::cpu::empty({0}, options), at::cpu::empty({0}, options), preactivation};
}

// saved: pooled, weights, g, z, W₁ g + b₁ where the activation's derivative needs it.
std::vector<Tensor> split_attention_pool_backward(at::TensorList grads, at::TensorList xs, const Tensor& weight1,
                                                  const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
                                                  Name activation, const OptionalTensor& presence,
                                                  at::TensorList given_saved, const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  TorchPool torch(kName, xs, presence, 8.);
  const Pool& pool = torch.pool;
  const auto options = weight1.options();
  const int64_t hidden = weight1.size(0);
  std::vector<Tensor> results;
  torch.set_grads(xs, needed, results);
  const size_t at_weight1 = xs.size();
  const Tensor parameters[] = {weight1, bias1, weight2, bias2};
  for (size_t i = 0; i < 4; ++i) results.push_back(empty_like_weight(parameters[i], needed[at_weight1 + i]));
  results.push_back(at::cpu::empty({0}, options));  // presence
  if (pool.rows == 0) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  bool any_source = false;
  for (size_t i = 0; i < at_weight1; ++i) any_source |= needed[i];
  const bool wants[] = {needed[at_weight1], needed[at_weight1 + 1], needed[at_weight1 + 2], needed[at_weight1 + 3]};
  const bool into_first = any_source || wants[0] || wants[1];

  torch.set_output_grads(grads[0], grads[1], saved[1]);
  const int64_t energies = pool.modalities * pool.width;
  const Tensor grad_energies = with_huge_pages(at::cpu::empty({pool.rows, energies}, options));
  const Tensor grad_z = at::cpu::empty({pool.rows, hidden}, options),
               grad_sum = at::cpu::empty({pool.rows, pool.width}, options);
  const SplitPoolParams p{pool, grad_sum.data_ptr(), grad_energies.data_ptr()};
  MMK_DISPATCH(split_pool_energy_gradients)(p);

  TorchLinear second(kName, pool.rows, weight2, 4.);
  second.set_input(saved[3].const_data_ptr(), hidden);
  second.set_output_grad(grad_energies.const_data_ptr(), energies);
  if (into_first) second.set_input_grad(grad_z);
  if (wants[2]) second.set_weight_grad(results[at_weight1 + 2]);
  second.params.grad_bias = data_or_null(results[at_weight1 + 3], wants[3]);
  second.backward();
  if (!into_first) return results;

  TorchLinear first(kName, pool.rows, weight1, 4.);
  first.set_input(saved[2].const_data_ptr(), pool.width);
  first.set_output_grad(grad_z.const_data_ptr(), hidden);
  if (any_source) first.set_input_grad(grad_sum);
  if (wants[0]) first.set_weight_grad(results[at_weight1]);
  first.params.grad_bias = data_or_null(results[at_weight1 + 1], wants[1]);
  first.params.activation = activation_of(activation);
  if (derives_from_output(first.params.activation)) {
    first.params.out = const_cast<void*>(saved[3].const_data_ptr());
  } else {
    first.params.preactivation = const_cast<void*>(saved[4].const_data_ptr());
  }
  first.backward();
  if (any_source) MMK_DISPATCH(split_pool_source_gradients)(p);
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = pool_shape(arguments[0]);
  const Tensor& weight1 = arguments[1].toTensor();
  if (!shape || weight1.dim() != 2) return false;
  const int64_t hidden = weight1.size(0), energies = shape->modalities * shape->width;
  return shape->fits(weight1, {hidden, shape->width}) && shape->fits(arguments[2], {hidden}) &&
         shape->fits(arguments[3], {energies, hidden}) && shape->fits(arguments[4], {energies}) &&
         (arguments[5].isNone() || is_activation(arguments[5].toStringRef())) && shape->presence_fits(arguments[6]);
}

const DoorCheck door_check(kName, fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_split_attention_pool_fwd(Tensor[] xs, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
      "str? activation, Tensor? presence, bool training) -> "
      "(Tensor pooled, Tensor weights, Tensor sum, Tensor hidden, Tensor preactivation)");
  m.def(
      "_split_attention_pool_bwd(Tensor[] grads, Tensor[] xs, Tensor weight1, Tensor bias1, Tensor weight2, "
      "Tensor bias2, str? activation, Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_split_attention_pool_fwd", split_attention_pool_forward);
  m.impl("_split_attention_pool_bwd", split_attention_pool_backward);
}

}  // namespace mmk::split_attention_pool

// multiplicative_attention_pool on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/attention_pool/multiplicative_attention_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/attention_pool/torch_linear.h"
#include "csrc/attention_pool/torch_pool.h"
#include "csrc/door.h"

namespace mmk::multiplicative_attention_pool {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "multiplicative_attention_pool";

// q W: what the gradient q of x Wᵀ is for x.
Tensor projected(const Tensor& query, const Tensor& weight) {
  const Tensor result = at::cpu::empty({query.size(0), weight.size(1)}, query.options());
  if (result.numel() == 0) return result;
  if (weight.size(0) == 0) return result.zero_();
  TorchLinear linear(kName, query.size(0), weight, 2.);
  linear.set_input_grad(result);
  linear.set_output_grad(query.const_data_ptr(), query.stride(0));
  linear.backward();
  return result;
}

std::tuple<Tensor, Tensor, Tensor> multiplicative_attention_pool_forward(at::TensorList xs, const Tensor& query,
                                                                         const OptionalTensor& weight, double scale,
                                                                         const OptionalTensor& presence,
                                                                         bool training) {
  TorchPool torch(kName, xs, presence, 4.);
  const Pool& pool = torch.pool;
  const auto options = query.options();
  const Tensor pooled = at::cpu::empty({pool.rows, pool.width}, options);
  const Tensor weights = at::cpu::empty({pool.rows, pool.modalities}, options);
  const Tensor q = weight ? projected(query, *weight) : query;
  torch.set_outputs(pooled, weights);
  if (pool.rows > 0) {
    MMK_DISPATCH(multiplicative_pool_forward)
    ({pool, static_cast<float>(scale), {q.const_data_ptr(), q.stride(0)}, nullptr});
  }
  return {pooled, weights, training && weight ? q : at::cpu::empty({0}, options)};
}

// saved: pooled, weights, q W.
std::vector<Tensor> multiplicative_attention_pool_backward(at::TensorList grads, at::TensorList xs, const Tensor& query,
                                                           const OptionalTensor& weight, double scale,
                                                           const OptionalTensor& presence, at::TensorList given_saved,
                                                           const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  TorchPool torch(kName, xs, presence, 8.);
  const Pool& pool = torch.pool;
  const size_t count = xs.size();
  const auto options = query.options();
  std::vector<Tensor> results;
  torch.set_grads(xs, needed, results);
  results.push_back(empty_if(query, needed[count]));
  results.push_back(empty_like_weight(weight ? *weight : query, weight && needed[count + 1]));
  results.push_back(at::cpu::empty({0}, options));  // presence
  if (pool.rows == 0) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  torch.set_output_grads(grads[0], grads[1], saved[1]);
  const bool through_weight = weight && (needed[count] || needed[count + 1]);
  const Tensor grad_q = through_weight ? at::cpu::empty({pool.rows, pool.width}, options) : results[count];
  const Tensor& q = weight ? saved[2] : query;
  MMK_DISPATCH(multiplicative_pool_backward)
  ({pool,
    static_cast<float>(scale),
    {q.const_data_ptr(), q.stride(0)},
    through_weight || needed[count] ? grad_q.data_ptr() : nullptr});
  if (!through_weight) return results;
  if (needed[count] && query.numel() > 0) {  // dq = dq' Wᵀ
    TorchLinear linear(kName, pool.rows, *weight, 2.);
    linear.set_input(grad_q.const_data_ptr(), pool.width);
    linear.params.out = results[count].data_ptr();
    linear.forward();
  }
  if (needed[count + 1] && weight->numel() > 0) {  // dW = qᵀ dq'
    TorchLinear linear(kName, pool.rows, *weight, 2.);
    linear.set_input(grad_q.const_data_ptr(), pool.width);
    linear.set_weight_grad(results[count + 1]);
    linear.set_output_grad(query.const_data_ptr(), query.stride(0));
    linear.backward();
  }
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = pool_shape(arguments[0]);
  const Tensor& query = arguments[1].toTensor();
  if (!shape || query.dim() != 2) return false;
  return shape->fits(query, {shape->rows, arguments[2].isNone() ? shape->width : query.size(1)}) &&
         shape->fits(arguments[2], {query.size(1), shape->width}) && shape->presence_fits(arguments[4]);
}

const DoorCheck door_check(kName, fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_multiplicative_attention_pool_fwd(Tensor[] xs, Tensor query, Tensor? weight, float scale, Tensor? presence, "
      "bool training) -> (Tensor pooled, Tensor weights, Tensor projected)");
  m.def(
      "_multiplicative_attention_pool_bwd(Tensor[] grads, Tensor[] xs, Tensor query, Tensor? weight, float scale, "
      "Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_multiplicative_attention_pool_fwd", multiplicative_attention_pool_forward);
  m.impl("_multiplicative_attention_pool_bwd", multiplicative_attention_pool_backward);
}

}  // namespace mmk::multiplicative_attention_pool

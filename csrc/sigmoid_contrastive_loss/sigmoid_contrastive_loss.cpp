// sigmoid_contrastive_loss on the CPU, as torch sees it. Arguments were checked before.
#include "csrc/sigmoid_contrastive_loss/sigmoid_contrastive_loss.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "csrc/contrastive/torch_products.h"
#include "csrc/door.h"

namespace mmk::sigmoid_contrastive_loss {
namespace {

using at::Tensor;

double total_of(const std::vector<double>& sums) { return std::accumulate(sums.begin(), sums.end(), 0.); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                                                   const Tensor& logit_bias, int64_t first_target, int64_t total,
                                                   bool of_x, bool of_y, bool training) {
  const PairProducts products("sigmoid_contrastive_loss", x, y, logit_scale.item<double>());
  const auto rows = static_cast<size_t>(x.size(0));
  const double mean = 1. / static_cast<double>(std::max<int64_t>(total, 1));
  std::vector<double> losses(rows), of_scale(rows), of_bias(rows);
  const auto options = x.options().dtype(at::kFloat);
  const Tensor none = at::cpu::empty({0}, options);
  of_x = of_x && training;
  of_y = of_y && training;
  const Tensor x_grad = of_x ? at::cpu::empty(x.sizes(), options) : none;
  std::vector<Tensor> sums = products.new_sums(of_y);
  const double factor = mean * logit_scale.item<double>();
  SigmoidTile call;
  call.bias = logit_bias.item<float>();
  call.with_gradients = training;
  call.losses = losses.data();
  call.of_scale = of_scale.data();
  call.of_bias = of_bias.data();
  products.for_each_tile(first_target, {}, {}, [&](int64_t group, const PairTile& tile, const Tensor& gradients) {
    SigmoidTile p = call;
    p.pairs = tile;
    MMK_DISPATCH(sigmoid_pairs)(p);
    if (of_x) products.of_x(x_grad, gradients, tile, factor);
    if (of_y) products.add_to_y(sums[static_cast<size_t>(group)], gradients, tile);
  });
  const Tensor loss = at::scalar_tensor(total_of(losses) * mean, options);
  if (!training) return {loss, none, none.clone(), none.clone()};
  const Tensor of_scalars = at::cpu::empty({2}, options);
  of_scalars.data_ptr<float>()[0] = static_cast<float>(total_of(of_scale) * mean * products.sign());
  of_scalars.data_ptr<float>()[1] = static_cast<float>(total_of(of_bias) * mean);
  return {loss, x_grad, of_y ? products.of_y(sums, factor, at::kFloat) : none.clone(), of_scalars};
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                             const Tensor& logit_bias, int64_t first_target, int64_t total, bool of_x, bool of_y,
                             at::TensorList saved, const c10::List<bool>& needed) {
  const auto lacks = [&](size_t i, const Tensor& t) { return needed[i] && saved[i].numel() != t.numel(); };
  if (lacks(0, x) || lacks(1, y)) {  // the forward did not know
    of_x = needed[0];
    of_y = needed[1];
    const auto [loss, x_grad, y_grad, scalars] =
        forward(x, y, logit_scale, logit_bias, first_target, total, of_x, of_y, true);
    const std::vector<Tensor> made = {x_grad, y_grad, scalars};
    return backward(grads, x, y, logit_scale, logit_bias, first_target, total, of_x, of_y, made, needed);
  }
  const Tensor of_scalars = saved[2].contiguous();
  const auto times = [&](size_t i, const Tensor& unit, const Tensor& like) {
    return needed[i] ? at::mul(unit, grads[0]).to(like.scalar_type()).contiguous()
                     : at::cpu::empty({0}, like.options());
  };
  return {times(0, saved[0], x), times(1, saved[1], y), times(2, of_scalars[0], logit_scale),
          times(3, of_scalars[1], logit_bias)};
}

bool fits(const std::vector<c10::IValue>& arguments) { return are_pairs(arguments, 2); }

const DoorCheck door_check("sigmoid_contrastive_loss", fits, DoorCheck::Dtypes::any);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_sigmoid_contrastive_loss_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, int first_target, "
      "int total, bool of_x, bool of_y, bool training) -> (Tensor loss, Tensor x_grad, Tensor y_grad, Tensor "
      "scalar_grads)");
  m.def(
      "_sigmoid_contrastive_loss_bwd(Tensor[] grads, Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, "
      "int first_target, int total, bool of_x, bool of_y, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_sigmoid_contrastive_loss_fwd", forward);
  m.impl("_sigmoid_contrastive_loss_bwd", backward);
}

}  // namespace mmk::sigmoid_contrastive_loss

// bilinear_fusion on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/bilinear_fusion/bilinear_fusion.h"

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::bilinear_fusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

BilinearParams make_params(const Tensor& x, const Tensor& y, const Tensor& x_weight, const Tensor& y_weight,
                           int64_t rank, double products, std::vector<Tensor>& keep) {
  BilinearParams p;
  const auto set = [&](BilinearSide& side, const Tensor& t, const Tensor& weight) {
    side.x = t.const_data_ptr();
    side.x_stride = row_stride(t);
    side.width = t.size(1);
    side.weight = matrix_of(weight, keep);
  };
  set(p.sides[0], x, x_weight);
  set(p.sides[1], y, y_weight);
  p.batch = x.size(0);
  p.outputs = x_weight.size(0) / rank;
  p.rank = rank;
  p.dtype = floating_dtype_of("bilinear_fusion", x);
  p.workers = torch_workers(products * static_cast<double>(p.batch) * static_cast<double>(x_weight.size(0)) *
                            static_cast<double>(x.size(1) + y.size(1)));
  return p;
}

std::tuple<Tensor, Tensor, Tensor> bilinear_fusion_forward(const Tensor& given_x, const Tensor& given_y,
                                                           const Tensor& x_weight, const Tensor& y_weight, int64_t rank,
                                                           const OptionalTensor& presence, bool training) {
  const RowPresence present(presence, 2);
  const Tensor x = present.of(given_x, 0), y = present.of(given_y, 1);
  std::vector<Tensor> keep;
  BilinearParams p = make_params(x, y, x_weight, y_weight, rank, 1., keep);
  const Tensor out = at::cpu::empty({p.batch, p.outputs}, x.options());
  const std::vector<int64_t> kept =
      training ? std::vector<int64_t>{x_weight.size(0), p.batch} : std::vector<int64_t>{0};
  const Tensor x_projection = at::cpu::empty(kept, x.options()), y_projection = at::cpu::empty(kept, x.options());
  if (out.numel() > 0) {
    p.out = out.data_ptr();
    if (training) {
      p.sides[0].projection = x_projection.data_ptr();
      p.sides[1].projection = y_projection.data_ptr();
    }
    MMK_DISPATCH(bilinear_forward)(p);
  }
  return {out, x_projection, y_projection};
}

std::vector<Tensor> bilinear_fusion_backward(const std::vector<Tensor>& grads, const Tensor& given_x,
                                             const Tensor& given_y, const Tensor& x_weight, const Tensor& y_weight,
                                             int64_t rank, const OptionalTensor& presence,
                                             const std::vector<Tensor>& saved, const c10::List<bool>& needed) {
  const RowPresence present(presence, 2);
  const Tensor x = present.of(given_x, 0), y = present.of(given_y, 1);
  std::vector<Tensor> keep;
  BilinearParams p = make_params(x, y, x_weight, y_weight, rank, 2., keep);
  const std::vector<Tensor> results{empty_if(x, needed[0]), empty_if(y, needed[1]),
                                    empty_like_weight(x_weight, needed[2]), empty_like_weight(y_weight, needed[3]),
                                    at::cpu::empty({0}, x.options())};
  if (p.batch == 0 || p.outputs == 0) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  const std::vector<Tensor> projections = contiguous_tensors(saved);
  p.grad_out = grads[0].const_data_ptr();
  p.grad_out_stride = row_stride(grads[0]);
  for (int s = 0; s < 2; ++s) {
    p.sides[s].projection = projections[s].data_ptr();
    if (needed[s]) p.sides[s].grad_x = results[s].data_ptr();
    if (needed[2 + s]) p.sides[s].grad_weight = results[2 + s].data_ptr();
    p.sides[s].stream = worth_streaming(static_cast<int64_t>(results[2 + s].nbytes()));
  }
  MMK_DISPATCH(bilinear_backward)(p);
  for (int s = 0; s < 2; ++s) present.clear(results[s], s);
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &x = arguments[0].toTensor(), &y = arguments[1].toTensor();
  const Tensor &x_weight = arguments[2].toTensor(), &y_weight = arguments[3].toTensor();
  const int64_t rank = arguments[4].toInt();
  for (const Tensor* t : {&x, &y, &x_weight, &y_weight}) {
    if (t->dim() != 2 || t->scalar_type() != x.scalar_type()) return false;
  }
  return arguments[5].isNone() && y.size(0) == x.size(0) && x_weight.size(1) == x.size(1) &&
         y_weight.size(1) == y.size(1) && y_weight.size(0) == x_weight.size(0) && rank >= 1 &&
         x_weight.size(0) % rank == 0;
}

const DoorCheck door_check("bilinear_fusion", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_bilinear_fusion_fwd(Tensor x, Tensor y, Tensor x_weight, Tensor y_weight, int rank, Tensor? presence, "
      "bool training) -> (Tensor out, Tensor x_projection, Tensor y_projection)");
  m.def(
      "_bilinear_fusion_bwd(Tensor[] grads, Tensor x, Tensor y, Tensor x_weight, Tensor y_weight, int rank, "
      "Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_bilinear_fusion_fwd", bilinear_fusion_forward);
  m.impl("_bilinear_fusion_bwd", bilinear_fusion_backward);
}

}  // namespace mmk::bilinear_fusion

// low_rank_fusion on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/low_rank_fusion/low_rank_fusion.h"

#include <torch/library.h>

#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::low_rank_fusion {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `keep` holds the copies of factors that have neither dense rows nor dense columns.
std::vector<LowRankModality> modalities_of(const std::vector<Tensor>& xs, const std::vector<Tensor>& factors,
                                           std::vector<Tensor>& keep) {
  std::vector<LowRankModality> modalities;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    const bool by_columns = lies_by_columns(factors[i]), dense = factors[i].stride(2) == 1 || factors[i].size(2) <= 1;
    keep.push_back(by_columns || dense ? factors[i] : factors[i].contiguous());
    const Tensor& f = keep.back();
    const Matrix first{f.const_data_ptr(), f.stride(by_columns ? 2 : 1), by_columns};
    modalities.push_back({x.const_data_ptr(), row_stride(x), x.size(1), first, f.stride(0)});
  }
  return modalities;
}

LowRankParams make_params(const std::vector<LowRankModality>& modalities, const Tensor& x, const Tensor& factor,
                          const Tensor& rank_weights, double products) {
  LowRankParams p;
  p.modalities = modalities.data();
  p.count = static_cast<int64_t>(modalities.size());
  p.batch = x.size(0);
  p.rank = factor.size(0);
  p.outputs = factor.size(2);
  p.dtype = floating_dtype_of("low_rank_fusion", x);
  p.rank_weights = rank_weights.const_data_ptr();
  double entries = 0.;
  for (const LowRankModality& m : modalities) entries += static_cast<double>(m.width + 1);
  p.workers = torch_workers(products * static_cast<double>(p.batch) * static_cast<double>(p.rank) *
                            static_cast<double>(p.outputs) * entries);
  return p;
}

Tensor low_rank_fusion_forward(const std::vector<Tensor>& given, const std::vector<Tensor>& factors,
                               const Tensor& rank_weights, const OptionalTensor& bias, const OptionalTensor& presence,
                               bool) {
  const auto xs = RowPresence(presence, static_cast<int64_t>(given.size())).of(given);
  std::vector<Tensor> keep;
  const auto modalities = modalities_of(xs, factors, keep);
  LowRankParams p = make_params(modalities, xs[0], factors[0], rank_weights, 1.);
  const Tensor out = at::cpu::empty({p.batch, p.outputs}, xs[0].options());
  if (out.numel() == 0) return out;
  if (bias) p.bias = bias->const_data_ptr();
  p.out = out.data_ptr();
  MMK_DISPATCH(low_rank_forward)(p);
  return out;
}

std::vector<Tensor> low_rank_fusion_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& given,
                                             const std::vector<Tensor>& factors, const Tensor& rank_weights,
                                             const OptionalTensor& bias, const OptionalTensor& presence,
                                             const std::vector<Tensor>&, const c10::List<bool>& needed) {
  const RowPresence present(presence, static_cast<int64_t>(given.size()));
  const auto xs = present.of(given);
  std::vector<Tensor> keep;
  auto modalities = modalities_of(xs, factors, keep);
  LowRankParams p = make_params(modalities, xs[0], factors[0], rank_weights, 3.);
  p.grad_out = grads[0].const_data_ptr();
  p.grad_out_stride = row_stride(grads[0]);
  const size_t count = xs.size();
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i) results.push_back(empty_if(xs[i], needed[i]));
  for (size_t i = 0; i < count; ++i) results.push_back(empty_like_weight(factors[i], needed[count + i]));
  results.push_back(empty_if(rank_weights, needed[2 * count]));
  const bool bias_needed = bias && needed[2 * count + 1];
  const Tensor grad_bias = bias ? empty_if(*bias, bias_needed) : at::cpu::empty({0}, rank_weights.options());
  results.push_back(grad_bias);
  results.push_back(at::cpu::empty({0}, rank_weights.options()));  // presence
  if (p.batch == 0 || p.outputs == 0 || p.rank == 0) {
    for (const Tensor& t : results) t.zero_();
    if (bias_needed && p.batch > 0 && p.outputs > 0) grad_bias.copy_(grads[0].sum(0));
    return results;
  }
  for (size_t i = 0; i < count; ++i) {
    if (needed[i] && xs[i].numel() > 0) modalities[i].grad_x = results[i].data_ptr();
    if (needed[count + i]) modalities[i].grad_factor = results[count + i].data_ptr();
  }
  if (needed[2 * count]) p.grad_rank_weights = results[2 * count].data_ptr();
  if (bias_needed) p.grad_bias = grad_bias.data_ptr();
  MMK_DISPATCH(low_rank_backward)(p);
  for (size_t i = 0; i < count; ++i) present.clear(results[i], static_cast<int64_t>(i));
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto xs = arguments[0].toListRef(), factors = arguments[1].toListRef();
  if (xs.empty() || factors.size() != xs.size() || !arguments[4].isNone()) return false;
  const Tensor &first = xs[0].toTensor(), &factor = factors[0].toTensor(), &rank_weights = arguments[2].toTensor();
  if (first.dim() != 2 || factor.dim() != 3) return false;
  const int64_t rank = factor.size(0), outputs = factor.size(2);
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor &x = xs[i].toTensor(), &f = factors[i].toTensor();
    if (x.dim() != 2 || x.size(0) != first.size(0) || x.scalar_type() != first.scalar_type() ||
        f.scalar_type() != first.scalar_type() || f.sizes() != at::IntArrayRef({rank, x.size(1) + 1, outputs})) {
      return false;
    }
  }
  const auto is_vector = [&](const Tensor& t, int64_t size) {
    return t.scalar_type() == first.scalar_type() && t.dim() == 1 && t.size(0) == size;
  };
  return is_vector(rank_weights, rank) && (arguments[3].isNone() || is_vector(arguments[3].toTensor(), outputs));
}

const DoorCheck door_check("low_rank_fusion", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_low_rank_fusion_fwd(Tensor[] xs, Tensor[] factors, Tensor rank_weights, Tensor? bias, Tensor? presence, "
      "bool training) -> Tensor out");
  m.def(
      "_low_rank_fusion_bwd(Tensor[] grads, Tensor[] xs, Tensor[] factors, Tensor rank_weights, Tensor? bias, "
      "Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_low_rank_fusion_fwd", low_rank_fusion_forward);
  m.impl("_low_rank_fusion_bwd", low_rank_fusion_backward);
}

}  // namespace mmk::low_rank_fusion

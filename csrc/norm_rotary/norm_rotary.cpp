// norm_rotary on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/norm_rotary): query is
// [B, H, L, D] and key [B, Hk, L, D], or packed [L, H, D] and [L, Hk, D]; cos and sin are [L, R/2] or [B or 1, L, R/2].
#include "csrc/norm_rotary/norm_rotary.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::norm_rotary {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kName = "norm_rotary";

Rows head_rows(const Tensor& t) {
  check_dense_rows(t, t.dim());
  if (t.dim() == 4) return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return {t.data_ptr(), 0, t.stride(1), t.stride(0)};
}

TokenRows table_rows(const Tensor& t) {
  check_dense_rows(t, t.dim());
  const bool by_batch = t.dim() == 3 && t.size(0) > 1;
  return {t.data_ptr(), by_batch ? t.stride(0) : 0, t.stride(-2)};
}

NormRotaryParams make_params(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                             const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                             bool interleaved, double operations) {
  NormRotaryParams p;
  const bool packed = query.dim() == 3;
  p.batch = packed ? 1 : query.size(0);
  p.length = query.size(packed ? 0 : 2);
  p.features = query.size(-1);
  p.half = cos.size(-1);
  p.dtype = floating_dtype_of(kName, query);
  p.table_dtype = floating_dtype_of(kName, cos);
  p.eps = static_cast<float>(eps);
  p.interleaved = interleaved;
  p.cos = table_rows(cos);
  p.sin = table_rows(sin);
  p.one_table = cos.dim() == 2 || cos.size(0) == 1;
  int64_t elements = 0;
  for (const int side : {0, 1}) {
    const Tensor& x = side == 0 ? query : key;
    const OptionalTensor& weight = side == 0 ? query_weight : key_weight;
    RotatedHeads& heads = p.sides[side];
    heads.heads = x.size(1);
    heads.x = head_rows(x);
    heads.stream = worth_streaming(static_cast<int64_t>(x.nbytes()));
    if (weight) {
      heads.weight = weight->const_data_ptr();
      p.weight_dtype = floating_dtype_of(kName, *weight);
    }
    elements += x.numel();
  }
  p.workers = torch_workers(operations * static_cast<double>(elements));
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                   const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                                   bool interleaved, bool) {
  const Tensor out = empty_in_order_of(query, query.sizes()), key_out = empty_in_order_of(key, key.sizes());
  NormRotaryParams p = make_params(query, key, cos, sin, query_weight, key_weight, eps, interleaved, 10.);
  p.sides[0].out = head_rows(out);
  p.sides[1].out = head_rows(key_out);
  MMK_DISPATCH(norm_rotary_forward)(p);
  return {out, key_out};
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& query, const Tensor& key, const Tensor& cos,
                             const Tensor& sin, const OptionalTensor& query_weight, const OptionalTensor& key_weight,
                             double eps, bool interleaved, at::TensorList, c10::List<bool> needed) {
  NormRotaryParams p = make_params(query, key, cos, sin, query_weight, key_weight, eps, interleaved, 20.);
  std::vector<Tensor> result{empty_gradient(needed[0], query),
                             empty_gradient(needed[1], key),
                             empty_if(cos, needed[2]),
                             empty_if(sin, needed[3]),
                             empty_if(query_weight.value_or(query), needed[4]),
                             empty_if(key_weight.value_or(key), needed[5])};
  for (size_t side = 0; side < 2; ++side) {
    p.sides[side].grad_out = head_rows(grads[side]);
    if (needed[side]) p.sides[side].grad_x = head_rows(result[side]);
    if (needed[4 + side]) p.sides[side].grad_weight = result[4 + side].data_ptr();
  }
  if (needed[2]) p.grad_cos = table_rows(result[2]);
  if (needed[3]) p.grad_sin = table_rows(result[3]);
  MMK_DISPATCH(norm_rotary_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &query = arguments[0].toTensor(), &key = arguments[1].toTensor();
  const Tensor &cos = arguments[2].toTensor(), &sin = arguments[3].toTensor();
  const bool packed = query.dim() == 3;
  if (!query.is_floating_point() || key.scalar_type() != query.scalar_type() || key.dim() != query.dim()) return false;
  if (!packed && query.dim() != 4) return false;
  const int64_t token = packed ? 0 : 2, length = query.size(token), features = query.size(-1);
  if (key.size(0) != query.size(0) || key.size(token) != length || key.size(-1) != features) return false;
  const auto has_dtype = [&](const Tensor& t) {
    return t.scalar_type() == query.scalar_type() || t.scalar_type() == at::kFloat;
  };
  const bool by_batch = !packed && cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == query.size(0));
  if (cos.dim() != 2 && !by_batch) return false;
  if (!has_dtype(cos) || sin.scalar_type() != cos.scalar_type() || sin.sizes() != cos.sizes()) return false;
  if (cos.size(-2) != length || cos.size(-1) > features / 2) return false;
  const auto fits_weight = [&](size_t i) {
    if (arguments[i].isNone()) return true;
    const Tensor& weight = arguments[i].toTensor();
    return has_dtype(weight) && weight.dim() == 1 && weight.size(0) == features;
  };
  if (!fits_weight(4) || !fits_weight(5)) return false;
  return arguments[4].isNone() || arguments[5].isNone() ||
         arguments[4].toTensor().scalar_type() == arguments[5].toTensor().scalar_type();
}

const DoorCheck door_check(kName, fits, DoorCheck::Dtypes::any);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_norm_rotary_fwd(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, "
      "float eps, bool interleaved, bool training) -> (Tensor, Tensor)");
  m.def(
      "_norm_rotary_bwd(Tensor[] grads, Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? query_weight, "
      "Tensor? key_weight, float eps, bool interleaved, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_norm_rotary_fwd", forward);
  m.impl("_norm_rotary_bwd", backward);
}

}  // namespace
}  // namespace mmk::norm_rotary

// concat_tokens on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/concat_tokens): xs are
// [B, L_i, C], type_embedding [M, C], and position_embeddings[j] [L_i, C] is that of source i = position_sources[j].
#include "csrc/concat_tokens/concat_tokens.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <vector>

#include "csrc/cpu/large_output.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"
#include "csrc/norm/torch_rows.h"

namespace mmk::concat_tokens {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kName = "concat_tokens";

TokenRows position_rows(const Tensor& t) {  // [L, C]
  return {t.data_ptr(), 0, row_stride(t)};
}

char* type_row(const Tensor& t, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + i * row_stride(t) * t.element_size();
}

std::vector<TokenSource> make_sources(at::TensorList xs, const OptionalTensor& types, at::TensorList positions,
                                      at::IntArrayRef position_sources) {
  std::vector<TokenSource> sources(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    sources[i].length = xs[i].size(1);
    sources[i].x = token_rows(xs[i]);
    if (types) sources[i].type = type_row(*types, static_cast<int64_t>(i));
  }
  for (size_t j = 0; j < positions.size(); ++j) sources[position_sources[j]].position = position_rows(positions[j]);
  return sources;
}

int64_t total_length(at::TensorList xs) {
  int64_t total = 0;
  for (const Tensor& x : xs) total += x.size(1);
  return total;
}

ConcatTokensParams make_params(const std::vector<TokenSource>& sources, const Tensor& x, const Tensor& out,
                               std::optional<std::string_view> norm, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, double operations) {
  ConcatTokensParams p;
  p.batch = out.size(0);
  p.features = out.size(2);
  p.dtype = row_dtype(kName, x);
  p.out_dtype = row_dtype(kName, out);
  p.norm = norm_named(kName, norm);
  p.eps = static_cast<float>(eps);
  p.sources = sources.data();
  p.source_count = static_cast<int64_t>(sources.size());
  p.weight = vector_data(weight);
  p.bias = vector_data(bias);
  p.stream = worth_streaming(static_cast<int64_t>(out.nbytes()));
  p.workers = torch_workers(operations * static_cast<double>(out.numel()));
  return p;
}

Tensor forward(at::TensorList xs, const OptionalTensor& types, at::TensorList positions,
               at::IntArrayRef position_sources, std::optional<std::string_view> norm, const OptionalTensor& weight,
               const OptionalTensor& bias, double eps, std::optional<at::ScalarType> out_dtype, bool) {
  const Tensor& x = xs[0];
  const auto options = x.options().dtype(out_dtype.value_or(x.scalar_type()));
  const Tensor out = with_huge_pages(at::cpu::empty({x.size(0), total_length(xs), x.size(2)}, options));
  if (out.numel() == 0) return out;
  const bool copies = !norm && !types && position_sources.empty() && out.scalar_type() == x.scalar_type();
  if (copies && !worth_streaming(static_cast<int64_t>(out.nbytes()))) {  // nothing to fuse, little to move
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor to = out;
    return at::cat_out(to, xs, 1);
  }
  const std::vector<TokenSource> sources = make_sources(xs, types, positions, position_sources);
  ConcatTokensParams p = make_params(sources, x, out, norm, weight, bias, eps, 10.);
  p.out = token_rows(out);
  MMK_DISPATCH(concat_tokens_forward)(p);
  return out;
}

std::vector<Tensor> backward(at::TensorList grads, at::TensorList xs, const OptionalTensor& types,
                             at::TensorList positions, at::IntArrayRef position_sources,
                             std::optional<std::string_view> norm, const OptionalTensor& weight,
                             const OptionalTensor& bias, double eps, std::optional<at::ScalarType>, at::TensorList,
                             c10::List<bool> needed) {
  const Tensor &x = xs[0], &grad_out = grads[0];
  std::vector<Tensor> result;
  std::vector<TokenSource> sources = make_sources(xs, types, positions, position_sources);
  const auto next = [&](const Tensor& like) {
    const bool wanted = needed[result.size()];
    result.push_back(with_huge_pages(empty_gradient(wanted, like, grad_out)));
    return wanted;
  };
  for (size_t i = 0; i < xs.size(); ++i) {
    if (next(xs[i])) sources[i].grad_x = token_rows(result.back());
  }
  if (next(types.value_or(x))) {
    for (size_t i = 0; i < xs.size(); ++i) sources[i].grad_type = type_row(result.back(), static_cast<int64_t>(i));
  }
  for (size_t j = 0; j < positions.size(); ++j) {
    if (next(positions[j])) sources[position_sources[j]].grad_position = position_rows(result.back());
  }
  ConcatTokensParams p = make_params(sources, x, grad_out, norm, weight, bias, eps, 20.);
  p.grad_out = token_rows(grad_out);
  if (next(weight.value_or(x))) p.grad_weight = result.back().data_ptr();
  if (next(bias.value_or(x))) p.grad_bias = result.back().data_ptr();
  if (grad_out.numel() == 0) {
    for (const Tensor& t : result) t.zero_();
    return result;
  }
  MMK_DISPATCH(concat_tokens_backward)(p);
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto xs = arguments[0].toTensorList();
  if (xs.empty() || xs.get(0).dim() != 3) return false;
  const Tensor first = xs.get(0);
  const auto dtype = first.scalar_type();
  const int64_t batch = first.size(0), features = first.size(2);
  for (const Tensor& x : xs) {
    if (x.scalar_type() != dtype || x.dim() != 3 || x.size(0) != batch || x.size(2) != features) return false;
  }
  const auto is = [&](const Tensor& t, at::IntArrayRef shape) {
    return t.scalar_type() == dtype && t.sizes() == shape;
  };
  const auto fits_if_given = [&](size_t i, at::IntArrayRef shape) {
    return arguments[i].isNone() || is(arguments[i].toTensor(), shape);
  };
  const auto positions = arguments[2].toTensorList();
  const auto sources = arguments[3].toIntList();
  if (positions.size() != sources.size()) return false;
  for (size_t j = 0; j < sources.size(); ++j) {
    if (!is(positions.get(j), {xs.get(static_cast<size_t>(sources.get(j))).size(1), features})) return false;
  }
  if (arguments[4].isNone()) {
    if (!arguments[5].isNone() || !arguments[6].isNone()) return false;
  } else if (arguments[4].toStringRef() != "layer" && arguments[4].toStringRef() != "rms") {
    return false;
  }
  return fits_if_given(1, {static_cast<int64_t>(xs.size()), features}) && fits_if_given(5, {features}) &&
         fits_if_given(6, {features});
}

const DoorCheck door_check("concat_tokens", fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_concat_tokens_fwd(Tensor[] xs, Tensor? type_embedding, Tensor[] position_embeddings, int[] position_sources, "
      "str? norm, Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType? out_dtype, bool training) -> Tensor");
  m.def(
      "_concat_tokens_bwd(Tensor[] grads, Tensor[] xs, Tensor? type_embedding, Tensor[] position_embeddings, "
      "int[] position_sources, str? norm, Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType? out_dtype, "
      "Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_concat_tokens_fwd", forward);
  m.impl("_concat_tokens_bwd", backward);
}

}  // namespace
}  // namespace mmk::concat_tokens

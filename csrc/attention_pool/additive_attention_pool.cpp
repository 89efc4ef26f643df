// additive_attention_pool on the CPU, as torch sees it. Arguments were checked at the door.
#include "csrc/attention_pool/additive_attention_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "csrc/attention_pool/torch_pool.h"
#include "csrc/door.h"

namespace mmk::additive_attention_pool {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Up to so many rows of modalities are one source, so that W is read once for all of them; more fill a block's tiles
// modality by modality.
constexpr int64_t kFlatRows = 64;

// What both passes are given. The views point into the tensors and into this.
struct Call {
  TorchPool torch;
  std::vector<ConcatSource> sources;
  std::vector<ConcatTerm> terms;
  std::vector<int32_t> modalities;
  std::vector<Tensor> keep;
  AdditivePoolParams params;

  Call(at::TensorList xs, const Tensor& weight, const Tensor& vector, const OptionalTensor& bias,
       const OptionalTensor& query, const OptionalTensor& query_weight, const OptionalTensor& presence, double products)
      : torch("additive_attention_pool", xs, presence, products * static_cast<double>(weight.size(0))) {
    AdditivePoolParams& p = params;
    const Pool& pool = torch.pool;
    p.hidden = weight.size(0);
    p.has_query = query && query->size(1) > 0;
    terms.reserve(static_cast<size_t>(pool.modalities + 1));
    p.flat = pool.rows * pool.modalities <= kFlatRows;
    const int64_t groups = p.flat ? 1 : pool.modalities;  // of A columns of z
    const Matrix matrix = matrix_of(weight, keep);
    if (p.flat && pool.width > 0) {
      add_source(torch.flattened(xs), pool.width, matrix, 0);
    } else if (pool.width > 0) {
      add_modalities(matrix);
    }
    if (p.has_query) {
      RowView rows{const_cast<void*>(query->const_data_ptr()), INT64_MAX, query->stride(0), 0};
      if (p.flat) rows = {rows.data, pool.modalities, 0, query->stride(0)};
      add_source(rows, query->size(1), matrix_of(*query_weight, keep), p.flat ? 0 : pool.modalities * p.hidden);
    }
    const int64_t columns = p.flat ? p.hidden : (groups + p.has_query) * p.hidden;
    p.sources = {sources.data(),
                 static_cast<int64_t>(sources.size()),
                 p.flat ? pool.rows * pool.modalities : pool.rows,
                 groups * pool.width,
                 columns,
                 pool.dtype};
    p.modalities = modalities.data();
    p.vector = vector.const_data_ptr();
    if (bias) p.bias = bias->const_data_ptr();
  }

  // Those that some row has, each in its own columns of z.
  void add_modalities(const Matrix& weight) {
    const Pool& pool = torch.pool;
    for (int64_t i = 0; i < pool.modalities; ++i) {
      if (!torch.may_be_present(i)) continue;
      const PoolModality& item = pool.items[i];
      add_source({const_cast<void*>(item.x), INT64_MAX, item.stride, 0}, pool.width, weight, i * params.hidden);
      sources.back().shares_weights = !modalities.empty();
      if (pool.present_stride > 0) {
        sources.back().present = pool.present + i;
        sources.back().present_stride = pool.present_stride;
      }
      modalities.push_back(static_cast<int32_t>(i));
    }
  }

  void add_source(const RowView& rows, int64_t width, const Matrix& weight, int64_t column) {
    ConcatTerm term;
    term.weight = weight;
    term.features = params.hidden;
    term.column = column;
    terms.push_back(term);
    ConcatSource source;
    source.x = rows;
    source.width = width;
    source.terms = &terms.back();
    source.term_count = 1;
    sources.push_back(source);
  }

  // Sources of the modalities, the query's not among them.
  size_t modality_sources() const { return sources.size() - (params.has_query ? 1 : 0); }

  const AdditivePoolParams& finished() {
    params.pool = torch.pool;
    return params;
  }
};

std::tuple<Tensor, Tensor, Tensor> additive_attention_pool_forward(at::TensorList xs, const Tensor& weight,
                                                                   const Tensor& vector, const OptionalTensor& bias,
                                                                   const OptionalTensor& query,
                                                                   const OptionalTensor& query_weight,
                                                                   const OptionalTensor& presence, bool training) {
  Call call(xs, weight, vector, bias, query, query_weight, presence, 2.);
  const Pool& pool = call.torch.pool;
  const auto options = weight.options();
  const Tensor pooled = at::cpu::empty({pool.rows, pool.width}, options);
  const Tensor weights = at::cpu::empty({pool.rows, pool.modalities}, options);
  const int64_t kept = training ? pool.modalities * weight.size(0) : 0;
  const Tensor activations = training ? at::cpu::empty({pool.rows, kept}, options) : at::cpu::empty({0}, options);
  call.torch.set_outputs(pooled, weights);
  if (training) call.params.activations = activations.data_ptr();
  if (pool.rows > 0) MMK_DISPATCH(additive_pool_forward)(call.finished());
  return {pooled, weights, activations};
}

// saved: pooled, weights, activations.
std::vector<Tensor> additive_attention_pool_backward(at::TensorList grads, at::TensorList xs, const Tensor& weight,
                                                     const Tensor& vector, const OptionalTensor& bias,
                                                     const OptionalTensor& query, const OptionalTensor& query_weight,
                                                     const OptionalTensor& presence, at::TensorList given_saved,
                                                     const c10::List<bool>& needed) {
  const std::vector<Tensor> saved = contiguous_tensors(given_saved);
  Call call(xs, weight, vector, bias, query, query_weight, presence, 4.);
  AdditivePoolParams& p = call.params;
  Pool& pool = call.torch.pool;
  std::vector<Tensor> results;
  call.torch.set_grads(xs, needed, results);
  const size_t first = xs.size();
  const OptionalTensor others[] = {weight, vector, bias, query, query_weight};
  for (size_t i = 0; i < 5; ++i)
    results.push_back(empty_like_weight(others[i] ? *others[i] : weight, needed[first + i]));
  results.push_back(at::cpu::empty({0}, weight.options()));  // presence
  if (pool.rows == 0) {
    for (const Tensor& t : results) t.zero_();
    return results;
  }
  const auto grad_of = [&](size_t i) { return needed[first + i] ? results[first + i].data_ptr() : nullptr; };
  const size_t modalities = call.modality_sources();
  if (modalities == 0 && needed[first]) results[first].zero_();  // nothing reads W
  int64_t with_grad = -1;
  for (int64_t i = 0; i < pool.modalities; ++i) {
    if (pool.items[i].grad == nullptr) continue;
    with_grad = i;
    if (p.flat || call.torch.may_be_present(i)) continue;
    // Absent everywhere, it has no source to write its zeros.
    (are_stacked(xs) ? results[0].select(1, i) : results[static_cast<size_t>(i)]).zero_();
  }
  for (size_t s = 0; s < modalities; ++s) {
    if (p.flat) {  // the kernel knows where each modality's rows go
      if (with_grad >= 0) call.sources[s].grad.data = pool.items[with_grad].grad;
    } else if (const PoolModality& item = pool.items[call.modalities[s]]; item.grad != nullptr) {
      call.sources[s].grad = {item.grad, INT64_MAX, item.grad_stride, 0};
    }
    if (needed[first]) set_grad(call.terms[s], results[first], 0);
  }
  if (p.has_query) {
    if (needed[first + 3]) call.sources.back().grad = dense_rows(results[first + 3], query->size(1));
    if (needed[first + 4]) set_grad(call.terms.back(), results[first + 4], 0);
  }
  p.grad_vector = grad_of(1);
  p.grad_bias = bias ? grad_of(2) : nullptr;
  call.torch.set_output_grads(grads[0], grads[1], saved[1]);
  p.activations = const_cast<void*>(saved[2].const_data_ptr());
  MMK_DISPATCH(additive_pool_backward)(call.finished());
  return results;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto shape = pool_shape(arguments[0]);
  const Tensor& weight = arguments[1].toTensor();
  if (!shape || weight.dim() != 2 || arguments[4].isNone() != arguments[5].isNone()) return false;
  const int64_t hidden = weight.size(0);
  if (!arguments[4].isNone()) {
    const Tensor& query = arguments[4].toTensor();
    if (query.dim() != 2 || !shape->fits(query, {shape->rows, query.size(1)}) ||
        !shape->fits(arguments[5], {hidden, query.size(1)})) {
      return false;
    }
  }
  return shape->fits(weight, {hidden, shape->width}) && shape->fits(arguments[2], {hidden}) &&
         shape->fits(arguments[3], {hidden}) && shape->presence_fits(arguments[6]);
}

const DoorCheck door_check("additive_attention_pool", fits);

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_additive_attention_pool_fwd(Tensor[] xs, Tensor weight, Tensor vector, Tensor? bias, Tensor? query, "
      "Tensor? query_weight, Tensor? presence, bool training) -> (Tensor pooled, Tensor weights, Tensor activations)");
  m.def(
      "_additive_attention_pool_bwd(Tensor[] grads, Tensor[] xs, Tensor weight, Tensor vector, Tensor? bias, "
      "Tensor? query, Tensor? query_weight, Tensor? presence, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_additive_attention_pool_fwd", additive_attention_pool_forward);
  m.impl("_additive_attention_pool_bwd", additive_attention_pool_backward);
}

}  // namespace mmk::additive_attention_pool

// The tensors of a concatenation as ConcatSources. Arguments were checked at the door.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "csrc/concat/sources.h"
#include "csrc/cpu/activation_kind.h"
#include "csrc/cpu/torch_tensors.h"

namespace mmk {

// Its rows, over all leading dims, as a view; `keep` holds the copy that more than two strides need.
inline RowView row_view(const at::Tensor& tensor, std::vector<at::Tensor>& keep) {
  const auto merge = [](const at::Tensor& t) {
    RowView view{const_cast<void*>(t.const_data_ptr()), 1, 0, 0};
    int levels = 0;
    int64_t outer = 1;
    for (int64_t dim = t.dim() - 2; dim >= 0; --dim) {
      const int64_t size = t.size(dim), stride = t.stride(dim);
      if (size == 1) continue;
      if (levels == 0) {
        view.inner = size;
        view.inner_stride = stride;
        levels = 1;
      } else if (levels == 1 && stride == view.inner * view.inner_stride) {
        view.inner *= size;
      } else if (levels == 1) {
        view.outer_stride = stride;
        outer = size;
        levels = 2;
      } else if (stride == outer * view.outer_stride) {
        outer *= size;
      } else {
        levels = 3;
        break;
      }
    }
    return std::pair{view, levels <= 2};
  };
  auto [view, fits] = merge(tensor);
  if (fits) return view;
  keep.push_back(tensor.contiguous());
  return merge(keep.back()).first;
}

// A dense matrix's.
inline RowView dense_rows(const at::Tensor& t, int64_t width) { return {t.data_ptr(), INT64_MAX, width, 0}; }

// A weight, as `matrix_of` gives it, from a column on, times whose transposed a source is multiplied into the first
// columns of z.
inline ConcatTerm column_term(const Matrix& matrix, const at::Tensor& weight, int64_t column) {
  ConcatTerm term;
  term.weight = matrix;
  term.weight.data =
      static_cast<const char*>(matrix.data) + column * (matrix.by_columns ? matrix.stride : 1) * weight.element_size();
  term.features = weight.size(0);
  return term;
}

// A gradient made by `empty_like_weight` of the term's.
inline void set_grad(ConcatTerm& term, const at::Tensor& grad, int64_t column) {
  term.grad_stride = grad.stride(term.weight.by_columns ? 1 : 0);
  term.grad = static_cast<char*>(grad.data_ptr()) +
              column * (term.weight.by_columns ? term.grad_stride : 1) * grad.element_size();
}

struct TorchSources {
  std::vector<ConcatSource> items;
  std::vector<int64_t> index;  // of each item among the xs
  std::vector<ConcatTerm> terms;
  std::vector<at::Tensor> keep;  // what the views point into
  int64_t rows = 1, columns = 0;
  Dtype dtype = Dtype::f32;

  // presence [M] drops the sources that are absent, [*, M] marks the rows of each.
  TorchSources(const char* op, const at::TensorList& xs, const std::optional<at::Tensor>& presence) {
    dtype = floating_dtype_of(op, xs[0]);
    for (const int64_t size : xs[0].sizes().slice(0, static_cast<size_t>(xs[0].dim() - 1))) rows *= size;
    const bool by_row = presence && presence->dim() > 1;
    const uint8_t* flags = nullptr;
    if (presence) {
      keep.push_back(presence->contiguous());
      flags = reinterpret_cast<const uint8_t*>(keep.back().const_data_ptr<bool>());
    }
    const auto count = static_cast<int64_t>(xs.size());
    for (int64_t i = 0; i < count; ++i) {
      ConcatSource source;
      source.width = xs[static_cast<size_t>(i)].size(-1);
      source.column = columns;
      columns += source.width;
      if (source.width == 0 || (flags != nullptr && !by_row && !flags[i])) continue;
      source.x = row_view(xs[static_cast<size_t>(i)], keep);
      if (by_row) {
        source.present = flags + i;
        source.present_stride = count;
      }
      items.push_back(source);
      index.push_back(i);
    }
  }

  // One term per source: its columns of one weight.
  void set_weight(const at::Tensor& weight) {
    const Matrix all = matrix_of(weight, keep);
    terms.resize(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      terms[i] = column_term(all, weight, items[i].column);
      items[i].terms = &terms[i];
      items[i].term_count = 1;
    }
  }
  void set_weight_grad(const at::Tensor& grad) {
    for (size_t i = 0; i < items.size(); ++i) set_grad(terms[i], grad, items[i].column);
  }

  // Where the gradients of the xs go, those that are needed; `grads` has one tensor per x.
  void set_grads(const std::vector<at::Tensor>& grads, const c10::List<bool>& needed) {
    for (size_t i = 0; i < items.size(); ++i) {
      const auto at = static_cast<size_t>(index[i]);
      if (needed[at]) items[i].grad = dense_rows(grads[at], items[i].width);
    }
  }

  ConcatSources view(int64_t features) {
    return {items.data(), static_cast<int64_t>(items.size()), rows, columns, features, dtype};
  }
};

// xs' leading dims and a last one.
inline std::vector<int64_t> output_sizes(const at::TensorList& xs, int64_t features) {
  std::vector<int64_t> sizes = xs[0].sizes().vec();
  sizes.back() = features;
  return sizes;
}

constexpr std::pair<std::string_view, Activation> kActivationNames[] = {{"relu", Activation::relu},
                                                                        {"gelu", Activation::gelu},
                                                                        {"gelu_tanh", Activation::gelu_tanh},
                                                                        {"silu", Activation::silu},
                                                                        {"tanh", Activation::tanh},
                                                                        {"sigmoid", Activation::sigmoid},
                                                                        {"quick_gelu", Activation::quick_gelu}};

// What modalities that fit together share: the leading dims, the sum of the last ones, the dtype.
struct SharedShape {
  std::vector<int64_t> lead;
  int64_t width = 0;
  at::ScalarType dtype;

  // Whether an optional argument, if given, is [of, last] of that dtype.
  bool fits(const c10::IValue& argument, at::IntArrayRef of, int64_t last) const {
    return argument.isNone() || fits(argument.toTensor(), dtype, of, last);
  }
  static bool fits(const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef of, int64_t last) {
    return t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(of.size()) + 1 && t.size(-1) == last &&
           t.sizes().slice(0, of.size()) == of;
  }
};
inline std::optional<SharedShape> shared_shape(const c10::List<at::Tensor>& xs) {
  if (xs.empty() || xs.get(0).dim() == 0) return std::nullopt;
  const at::Tensor first = xs.get(0);
  const auto lead = first.sizes().slice(0, static_cast<size_t>(first.dim() - 1));
  SharedShape shape{lead.vec(), 0, first.scalar_type()};
  for (const at::Tensor& x : xs) {
    if (!SharedShape::fits(x, shape.dtype, lead, x.dim() == 0 ? 0 : x.size(-1))) return std::nullopt;
    shape.width += x.size(-1);
  }
  return shape;
}

// Whether a list has one tensor [of[i], last] of the dtype for each modality; i is its number.
template <class Rows>
bool fits_each(const c10::IValue& list, const c10::IValue& xs, const SharedShape& shape, Rows of) {
  const auto tensors = list.toListRef(), modalities = xs.toListRef();
  if (tensors.size() != modalities.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto [lead, last] = of(modalities[i].toTensor().size(-1));
    if (!SharedShape::fits(tensors[i].toTensor(), shape.dtype, lead, last)) return false;
  }
  return true;
}

// Whether an optional presence is [*, M] or [M].
inline bool presence_fits(const c10::IValue& presence, const SharedShape& shape, size_t modalities) {
  if (presence.isNone()) return true;
  const auto count = static_cast<int64_t>(modalities);
  return SharedShape::fits(presence.toTensor(), at::kBool, shape.lead, count) ||
         SharedShape::fits(presence.toTensor(), at::kBool, {}, count);
}

inline bool is_activation(std::string_view name) {
  for (const auto& [known, activation] : kActivationNames) {
    if (known == name) return true;
  }
  return false;
}

inline Activation activation_of(const std::optional<std::string_view>& name) {
  if (!name) return Activation::none;
  for (const auto& [known, activation] : kActivationNames) {
    if (known == *name) return activation;
  }
  TORCH_CHECK_VALUE(false, "unknown activation ", *name);
}

}  // namespace mmk

// The tensors of an attention pool as a Pool. Arguments were checked at the door.
#pragma once

#include <ATen/core/List.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <optional>
#include <vector>

#include "csrc/attention_pool/pool.h"
#include "csrc/concat/torch_sources.h"
#include "csrc/cpu/torch_workers.h"

namespace mmk {

// xs are one tensor (B, M, D), or M tensors (B, D).
inline bool are_stacked(const at::TensorList& xs) { return xs[0].dim() == 3; }

class TorchPool {
 public:
  // `products`: operations for each element of x.
  TorchPool(const char* op, const at::TensorList& xs, const std::optional<at::Tensor>& presence, double products) {
    const bool stacked = are_stacked(xs);
    const auto bytes = static_cast<int64_t>(xs[0].element_size());
    pool.dtype = floating_dtype_of(op, xs[0]);
    pool.modalities = stacked ? xs[0].size(1) : static_cast<int64_t>(xs.size());
    pool.rows = xs[0].size(0);
    pool.width = xs[0].size(-1);
    items_.resize(static_cast<size_t>(pool.modalities));
    for (int64_t i = 0; i < pool.modalities; ++i) {
      const at::Tensor& x = xs[stacked ? 0 : static_cast<size_t>(i)];
      PoolModality& item = items_[static_cast<size_t>(i)];
      item.x = static_cast<const char*>(x.const_data_ptr()) + (stacked ? i * x.stride(1) * bytes : 0);
      item.stride = x.stride(0);
    }
    pool.items = items_.data();
    if (presence) {
      presence_ = presence->contiguous();
      pool.present = reinterpret_cast<const uint8_t*>(presence_.const_data_ptr<bool>());
      pool.present_stride = presence->dim() > 1 ? pool.modalities : 0;
    }
    pool.workers = torch_workers(products * static_cast<double>(pool.rows * pool.modalities) *
                                 static_cast<double>(pool.width + 16));
  }
  TorchPool(const TorchPool&) = delete;
  TorchPool& operator=(const TorchPool&) = delete;

  // Whether the modality is there in some row.
  bool may_be_present(int64_t i) const {
    return pool.present == nullptr || pool.present_stride > 0 || pool.present[i] != 0;
  }

  // Row b·M + i: modality i in row b. In place where that is possible, else a copy with zeros where one is absent; for
  // few rows.
  RowView flattened(const at::TensorList& xs) {
    if (are_stacked(xs) && pool.present == nullptr) return row_view(xs[0], keep_);
    keep_.push_back(at::cpu::empty({pool.rows * pool.modalities, pool.width}, xs[0].options()));
    const auto bytes = static_cast<int64_t>(xs[0].element_size()), row_bytes = pool.width * bytes;
    char* to = static_cast<char*>(keep_.back().data_ptr());
    for (int64_t row = 0; row < pool.rows; ++row) {
      for (int64_t i = 0; i < pool.modalities; ++i, to += row_bytes) {
        const PoolModality& item = items_[static_cast<size_t>(i)];
        if (is_present(pool, row, i)) {
          std::memcpy(to, static_cast<const char*>(item.x) + row * item.stride * bytes, static_cast<size_t>(row_bytes));
        } else {
          std::memset(to, 0, static_cast<size_t>(row_bytes));
        }
      }
    }
    return dense_rows(keep_.back(), pool.width);
  }

  // Fresh results, and where gradients of the xs go, those that are needed.
  void set_grads(const at::TensorList& xs, const c10::List<bool>& needed, std::vector<at::Tensor>& results) {
    const bool stacked = are_stacked(xs);
    for (size_t i = 0; i < xs.size(); ++i) {
      results.push_back(empty_if(xs[i], needed[i]));
      if (!needed[i]) continue;
      if (!stacked) {
        items_[i].grad = results[i].data_ptr();
        items_[i].grad_stride = pool.width;
        continue;
      }
      const int64_t row_bytes = pool.width * static_cast<int64_t>(xs[0].element_size());
      for (int64_t m = 0; m < pool.modalities; ++m) {
        items_[static_cast<size_t>(m)].grad = static_cast<char*>(results[0].data_ptr()) + m * row_bytes;
        items_[static_cast<size_t>(m)].grad_stride = pool.modalities * pool.width;
      }
    }
  }

  void set_outputs(const at::Tensor& pooled, const at::Tensor& weights) {
    pool.pooled = pooled.data_ptr();
    pool.weights = weights.data_ptr();
  }
  // Gradients of both outputs, and the weights themselves; rows of [B][M][D] are taken as rows of M·D.
  void set_output_grads(const at::Tensor& pooled, const at::Tensor& weights, const at::Tensor& kept_weights) {
    pool.grad_pooled = {pooled.const_data_ptr(), pooled.stride(0)};
    grad_weights_ = weights.dim() == 3 ? weights.contiguous() : weights;
    pool.grad_weights = {grad_weights_.const_data_ptr(), grad_weights_.stride(0)};
    kept_weights_ = kept_weights.contiguous();
    pool.weights = const_cast<void*>(kept_weights_.const_data_ptr());
  }

  Pool pool;

 private:
  std::vector<PoolModality> items_;
  std::vector<at::Tensor> keep_;  // what the views point into
  at::Tensor presence_, grad_weights_, kept_weights_;
};

// What the xs of a pool share.
struct PoolShape {
  int64_t rows, modalities, width;
  at::ScalarType dtype;

  bool fits(const c10::IValue& argument, at::IntArrayRef sizes) const {
    return argument.isNone() || fits(argument.toTensor(), sizes);
  }
  bool fits(const at::Tensor& t, at::IntArrayRef sizes) const { return t.scalar_type() == dtype && t.sizes() == sizes; }
  bool presence_fits(const c10::IValue& argument) const {
    if (argument.isNone()) return true;
    const at::Tensor& t = argument.toTensor();
    return t.scalar_type() == at::kBool &&
           (t.sizes() == at::IntArrayRef{modalities} || t.sizes() == at::IntArrayRef{rows, modalities});
  }
};
inline std::optional<PoolShape> pool_shape(const c10::IValue& argument) {
  const auto xs = argument.toTensorVector();
  if (xs.empty()) return std::nullopt;
  const at::Tensor& first = xs[0];
  if (first.dim() == 3 && xs.size() == 1 && first.size(1) > 0) {
    return PoolShape{first.size(0), first.size(1), first.size(2), first.scalar_type()};
  }
  if (first.dim() != 2) return std::nullopt;
  const PoolShape shape{first.size(0), static_cast<int64_t>(xs.size()), first.size(1), first.scalar_type()};
  for (const at::Tensor& x : xs) {
    if (!shape.fits(x, first.sizes())) return std::nullopt;
  }
  return shape;
}

}  // namespace mmk

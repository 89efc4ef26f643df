// Tensors as kernels see them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <vector>

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/large_output.h"
#include "csrc/cpu/matrix.h"

namespace mmk {

inline Dtype floating_dtype_of(const char* op, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, bfloat16 or float16; got ", t.scalar_type());
  }
}

// What kernels ask of a tensor. One without elements is never read, and has whatever strides: contiguous() keeps them.
inline void check_dense_rows(const at::Tensor& t, int64_t dims) {
  TORCH_CHECK_VALUE(t.dim() == dims, "expected a tensor of ", dims, " dims; got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0,
                    "expected a contiguous last dim; got shape ", t.sizes(), " with strides ", t.strides());
}

// The elements between two rows of a matrix whose rows are dense.
inline int64_t row_stride(const at::Tensor& t) {
  check_dense_rows(t, 2);
  return t.stride(0);
}

// Whether the last two dims are those of the view of a matrix that is transposed, or a part of one.
inline bool lies_by_columns(const at::Tensor& t) {
  return t.dim() >= 2 && t.stride(-1) != 1 && t.size(-1) > 1 && t.stride(-2) == 1 && t.numel() > 0;
}

// A weight [N, K] as it lies; `keep` holds the copy of one that has neither dense rows nor dense columns.
inline Matrix matrix_of(const at::Tensor& t, std::vector<at::Tensor>& keep) {
  TORCH_CHECK_VALUE(t.dim() == 2, "expected a matrix; got shape ", t.sizes());
  if (lies_by_columns(t)) return {t.const_data_ptr(), t.stride(1), true};
  if (t.stride(1) == 1 || t.size(1) <= 1 || t.numel() == 0) return {t.const_data_ptr(), t.stride(0), false};
  keep.push_back(t.contiguous());
  return {keep.back().const_data_ptr(), keep.back().stride(0), false};
}

// Tensors that a forward saved, as it wrote them, whoever has rearranged them in between.
inline std::vector<at::Tensor> contiguous_tensors(const at::TensorList& tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// Which modalities are there in which of the rows: [B, M], or [M] for all rows, or everything.
class RowPresence {
 public:
  RowPresence(const std::optional<at::Tensor>& presence, int64_t modalities) : modalities_(modalities) {
    if (!presence) return;
    by_row_ = presence->dim() > 1;
    kept_ = presence->contiguous();
    flags_ = kept_.const_data_ptr<bool>();
  }
  bool given() const { return flags_ != nullptr; }

  // x [B, K] with zeros in the rows where modality i is absent, whatever it holds there. A copy, where it may be.
  at::Tensor of(const at::Tensor& x, int64_t i) const {
    if (!given() || (!by_row_ && flags_[i])) return x;
    if (!by_row_) return at::zeros(x.sizes(), x.options());
    const at::Tensor copy = at::cpu::empty(x.sizes(), x.options());
    if (x.numel() == 0) return copy;
    const auto bytes = static_cast<size_t>(x.size(1) * x.element_size());
    const int64_t stride = row_stride(x) * x.element_size();
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(copy.data_ptr());
    for (int64_t row = 0; row < x.size(0); ++row, from += stride, to += bytes) {
      flags_[row * modalities_ + i] ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
    }
    return copy;
  }
  template <class Tensors>
  std::vector<at::Tensor> of(const Tensors& xs) const {
    std::vector<at::Tensor> result;
    for (const at::Tensor& x : xs) result.push_back(of(x, static_cast<int64_t>(result.size())));
    return result;
  }

  // Zeros in the same rows of a gradient [B, K], contiguous.
  void clear(const at::Tensor& grad, int64_t i) const {
    if (!given() || grad.numel() == 0) return;
    if (!by_row_) {
      if (!flags_[i]) grad.zero_();
      return;
    }
    const auto bytes = static_cast<size_t>(grad.size(1) * grad.element_size());
    char* to = static_cast<char*>(grad.data_ptr());
    for (int64_t row = 0; row < grad.size(0); ++row, to += bytes) {
      if (!flags_[row * modalities_ + i]) std::memset(to, 0, bytes);
    }
  }

 private:
  at::Tensor kept_;
  const bool* flags_ = nullptr;
  int64_t modalities_;
  bool by_row_ = false;
};

// Fresh and contiguous, of the argument's shape where it is wanted, else without elements.
inline at::Tensor empty_if(const at::Tensor& like, bool wanted) {
  return wanted ? with_huge_pages(at::cpu::empty(like.sizes(), like.options())) : at::cpu::empty({0}, like.options());
}

// As `empty_if`, with dense columns where the weight has them: what the parameter behind a transposed view accumulates
// without rearranging it.
inline at::Tensor empty_like_weight(const at::Tensor& weight, bool wanted) {
  if (!wanted || !lies_by_columns(weight)) return empty_if(weight, wanted);
  return empty_if(weight.transpose(-2, -1), true).transpose(-2, -1);
}

}  // namespace mmk

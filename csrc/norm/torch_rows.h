// Tensors as the Params of the row ops, and the memory of their results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#include <optional>
#include <string_view>

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/norm/norm.h"

namespace mmk {

inline Dtype row_dtype(const char* op, const at::Tensor& t) {
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

inline Norm norm_named(const char* op, std::optional<std::string_view> name) {
  if (!name) return Norm::none;
  TORCH_CHECK_VALUE(*name == "layer" || *name == "rms", op, ": norm: expected None, 'layer' or 'rms'; got '", *name,
                    "'");
  return *name == "layer" ? Norm::layer : Norm::rms;
}

// [B, L, C], features contiguous.
inline TokenRows token_rows(const at::Tensor& t) {
  check_dense_rows(t, 3);
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

inline const void* vector_data(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// A gradient, or an empty tensor where none is needed.
inline at::Tensor empty_gradient(bool needed, const at::Tensor& like, const at::Tensor& grad_out) {
  return needed ? at::cpu::empty(like.sizes(), like.options()) : at::cpu::empty({0}, grad_out.options());
}

}  // namespace mmk

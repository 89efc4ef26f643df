// Gradients with rows as kernels read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#include <algorithm>
#include <cstring>

#include "csrc/plain_call.h"

namespace mmk {

// A gradient as kernels take it. Of that of a sum, one number for all elements, one row stands for all: contiguous()
// would cost more than a small kernel.
inline at::Tensor with_dense_rows(const at::Tensor& grad) {
  if (has_dense_rows(grad)) return grad;
  const bool is_one_number =
      std::all_of(grad.strides().begin(), grad.strides().end(), [](int64_t s) { return s == 0; });
  if (!grad.is_cpu() || !is_one_number || grad.numel() == 0) return grad.contiguous();
  at::Tensor rows = at::cpu::empty({grad.size(-1)}, grad.options());
  const auto fill = [&](auto number) {
    std::memcpy(&number, grad.const_data_ptr(), sizeof number);
    std::fill_n(static_cast<decltype(number)*>(rows.mutable_data_ptr()), rows.numel(), number);
  };
  switch (grad.element_size()) {
    case 2:
      fill(uint16_t{});
      break;
    case 4:
      fill(uint32_t{});
      break;
    default:
      return grad.contiguous();
  }
  at::DimVector strides(grad.strides());
  strides.back() = 1;
  rows.unsafeGetTensorImpl()->set_sizes_and_strides(grad.sizes(), strides);
  return rows;
}

}  // namespace mmk

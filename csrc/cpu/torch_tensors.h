// Tensors as kernels see them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/large_output.h"

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

// The elements between two rows of a matrix whose rows are dense.
inline int64_t row_stride(const at::Tensor& t) {
  TORCH_INTERNAL_ASSERT(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1));
  return t.stride(0);
}

// Fresh and contiguous, of the argument's shape where it is wanted, else without elements.
inline at::Tensor empty_if(const at::Tensor& like, bool wanted) {
  return wanted ? with_huge_pages(at::empty(like.sizes(), like.options())) : at::empty({0}, like.options());
}

}  // namespace mmk

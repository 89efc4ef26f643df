// A linear layer on the rows of one dense tensor, by concat_linear's kernels: y = act(x Wᵀ + b).
#pragma once

#include <vector>

#include "csrc/concat/torch_sources.h"
#include "csrc/concat_linear/concat_linear.h"
#include "csrc/cpu/torch_workers.h"

namespace mmk {

class TorchLinear {
 public:
  // `rows` of x; W [N, K].
  TorchLinear(const char* op, int64_t rows, const at::Tensor& weight, double products) : keep_{weight} {
    ConcatLinearParams& p = params;
    term_ = column_term(matrix_of(weight, keep_), weight, 0);
    source_.width = weight.size(1);
    source_.terms = &term_;
    source_.term_count = 1;
    p.sources = {&source_,       source_.width > 0 ? 1 : 0,    rows, weight.size(1),
                 weight.size(0), floating_dtype_of(op, weight)};
    p.workers = torch_workers(products * static_cast<double>(rows) * static_cast<double>(weight.size(0)) *
                              static_cast<double>(weight.size(1) + 16));
  }
  TorchLinear(const TorchLinear&) = delete;
  TorchLinear& operator=(const TorchLinear&) = delete;

  // x and gradients of x are [rows][K].
  void set_input(const void* x, int64_t stride) { source_.x = {const_cast<void*>(x), INT64_MAX, stride, 0}; }
  void set_input_grad(const at::Tensor& grad) { source_.grad = dense_rows(grad, source_.width); }
  void set_weight_grad(const at::Tensor& grad) { set_grad(term_, grad, 0); }
  void set_output_grad(const void* grad, int64_t stride) {
    params.grad_out = {const_cast<void*>(grad), INT64_MAX, stride, 0};
  }

  void forward() const {
    if (params.sources.rows > 0 && params.sources.features > 0) MMK_DISPATCH(concat_linear_forward)(params);
  }
  // The gradients that were set; zeros where there is nothing to sum.
  void backward() const {
    if (params.sources.rows > 0) MMK_DISPATCH(concat_linear_backward)(params);
  }

  ConcatLinearParams params;

 private:
  std::vector<at::Tensor> keep_;  // the weight, or a copy
  ConcatSource source_;
  ConcatTerm term_;
};

}  // namespace mmk

// cross_attention on the CPU, for C++ that has torch's tensors.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace mmk::cross_attention {

// out, lse where it is asked for, and stats: row_max and log_sum, [2, B, Hq, Lq], of a training.
using CrossAttentionOutputs = std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor>;

// `mmkernels::_cross_attention_fwd`.
CrossAttentionOutputs cross_attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& key_lengths, int64_t window_left, int64_t window_right, bool bottom_right,
    double softcap, std::optional<double> scale, double dropout_p, const std::optional<at::Tensor>& rng_state,
    bool enable_gqa, bool return_lse, bool training);

// `mmkernels::_cross_attention_bwd`, the gradients of query, key and value written into those given where needed.
std::vector<at::Tensor> cross_attention_backward_into(
    const std::array<at::Tensor, 3>& gradients, at::TensorList grads, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& key_lengths, int64_t window_left,
    int64_t window_right, bool bottom_right, double softcap, std::optional<double> scale, double dropout_p,
    const std::optional<at::Tensor>& rng_state, bool enable_gqa, bool return_lse, at::TensorList saved,
    const c10::List<bool>& needed);

}  // namespace mmk::cross_attention

// What the private ops of cross_attention run, for the door that skips torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace mmk {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& key_lengths, int64_t window_left, int64_t window_right, bool bottom_right,
    double softcap, double scale, double dropout_p, const std::optional<at::Tensor>& rng_state, bool with_lse);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_attention_backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_log_sum, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& key_lengths, const at::Tensor& out, const at::Tensor& row_max,
    const at::Tensor& log_sum, int64_t window_left, int64_t window_right, bool bottom_right, double softcap,
    double scale, double dropout_p, const std::optional<at::Tensor>& rng_state, std::array<bool, 6> grad_mask);

}  // namespace mmk

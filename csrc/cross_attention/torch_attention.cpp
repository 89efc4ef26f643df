// torch's own attention on the CPU, `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward, on this
// library's kernels: what F.scaled_dot_product_attention calls, whoever calls that. What is slower here, or what the
// kernels do not take, torch's own kernel does; both leave the same for the backward of either.
//
//   serve_torch_attention(on) -> None; the first time, it overrides the operators' CPU kernels
//   count_torch_attention() -> [(direction, why torch's own kernel ran or None, calls)], of every reason there is
#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_cpu_dispatch.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/isa.h"
#include "csrc/cross_attention/cross_attention.h"
#include "csrc/door.h"
#include "csrc/plain_call.h"

namespace mmk::torch_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Who runs a call: these kernels, or torch's, and then why.
enum Runs : size_t { ours, of_dtype, of_arguments, of_few_queries, of_isa, kinds_of_runs };
constexpr std::array<const char*, kinds_of_runs> kReasons{
    nullptr, "no kernel of this dtype", "no kernel of these arguments", "slower here: few queries in float32",
    "slower here: the baseline instruction set"};

std::atomic<bool> serving{false};
using Counts = std::array<std::atomic<int64_t>, kinds_of_runs>;
Counts forward_calls{}, backward_calls{};

bool served(Counts& calls, Runs runs) {
  calls[runs].fetch_add(1, std::memory_order_relaxed);
  return runs == ours;
}

// The mask as torch's kernel takes it, [Lq, Lk] or [B, H, Lq, Lk] with sizes of 1 that broadcast.
bool takes_mask(const Tensor& mask, const Tensor& query, int64_t keys) {
  if (mask.dim() != 2 && mask.dim() != 4) return false;
  if (mask.scalar_type() != query.scalar_type() && mask.scalar_type() != at::kFloat) return false;
  const std::array full{query.size(0), query.size(1), query.size(2), keys};
  for (int64_t back = 1; back <= mask.dim(); ++back) {
    if (mask.size(-back) != 1 && mask.size(-back) != full[static_cast<size_t>(4 - back)]) return false;
  }
  return true;
}

Runs who_runs(const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p, bool is_causal,
              const OptionalTensor& mask) {
  const auto dtype = query.scalar_type();
  if (!has_kernel_dtype(query) || key.scalar_type() != dtype || value.scalar_type() != dtype) return of_dtype;
  if (dropout_p != 0. || query.dim() != 4 || key.dim() != 4 || value.dim() != 4) return of_arguments;
  const auto q = query.sizes(), k = key.sizes();
  const bool dense = has_dense_rows(query) && has_dense_rows(key) && has_dense_rows(value);
  if (!dense || value.sizes() != k || k[0] != q[0] || k[3] != q[3] || query.numel() == 0 || key.numel() == 0 ||
      q[1] % k[1] != 0 || !is_countable({q[0], q[1], q[2], k[2]}) || (mask && !takes_mask(*mask, query, k[2]))) {
    return of_arguments;
  }
  if (isa() == Isa::baseline) return of_isa;
  const int64_t keys = is_causal ? std::min(q[2], k[2]) : k[2];
  constexpr int64_t kFewQueries = 12;  // of which a tile has too little to do
  return dtype == at::kFloat && q[2] <= kFewQueries && keys > 4 * q[2] ? of_few_queries : ours;
}

// Autograd hands on a mask that was not given as one that is not defined.
OptionalTensor given(const OptionalTensor& mask) { return mask && mask->defined() ? mask : std::nullopt; }

// The log-sum-exp [B, H, L] of stats [2, B, H, L], in memory as torch has it, [B, L, H]; 0 where nothing is attended
// to.
Tensor lse_of(const Tensor& stats) {
  const int64_t batch = stats.size(1), heads = stats.size(2), length = stats.size(3);
  const Tensor lse = at::cpu::empty({batch, length, heads}, stats.options());
  const auto* row_max = stats.const_data_ptr<float>();
  const float* log_sum = row_max + stats.numel() / 2;
  auto* to = lse.data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b, to += length * heads) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < length; ++i, ++row_max, ++log_sum) {
        const bool empty = *row_max == -std::numeric_limits<float>::infinity();
        to[i * heads + h] = empty ? 0.f : *row_max + *log_sum;
      }
    }
  }
  return lse.transpose(1, 2);
}

// The same as stats: the whole log-sum-exp is as good a shift as the maximum.
Tensor stats_of(const Tensor& lse) {
  const int64_t batch = lse.size(0), heads = lse.size(1), length = lse.size(2), size = lse.numel();
  const Tensor stats = at::cpu::empty({2, batch, heads, length}, lse.options());
  auto* to = stats.data_ptr<float>();
  std::fill_n(to + size, size, 0.f);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h, to += length) {
      const float* from = lse.const_data_ptr<float>() + b * lse.stride(0) + h * lse.stride(1);
      for (int64_t i = 0; i < length; ++i) to[i] = from[i * lse.stride(2)];
    }
  }
  return stats;
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p,
                                     bool is_causal, const OptionalTensor& attn_mask, std::optional<double> scale) {
  const auto of_torch = [&] {
    return at::cpu::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask,
                                                                scale);
  };
  if (!serving.load(std::memory_order_relaxed)) return of_torch();
  const OptionalTensor mask = given(attn_mask);
  if (!served(forward_calls, who_runs(query, key, value, dropout_p, is_causal, mask))) return of_torch();
  const auto [out, none, stats] = cross_attention::cross_attention_forward(
      query, key, value, mask, {}, {}, {}, -1, is_causal ? 0 : -1, false, 0., scale, 0., {}, true, false, true);
  return {out, lse_of(stats)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& out, const Tensor& lse,
                                                      double dropout_p, bool is_causal, const OptionalTensor& attn_mask,
                                                      std::optional<double> scale) {
  const auto of_torch = [&] {
    return at::cpu::_scaled_dot_product_flash_attention_for_cpu_backward(grad, query, key, value, out, lse, dropout_p,
                                                                         is_causal, attn_mask, scale);
  };
  if (!serving.load(std::memory_order_relaxed)) return of_torch();
  OptionalTensor mask = given(attn_mask);
  Runs runs = who_runs(query, key, value, dropout_p, is_causal, mask);
  const bool fit = grad.sizes() == query.sizes() && out.sizes() == query.sizes() && lse.dim() == 3 &&
                   lse.sizes() == query.sizes().slice(0, 3) && grad.scalar_type() == query.scalar_type() &&
                   out.scalar_type() == query.scalar_type() && lse.scalar_type() == at::kFloat;
  if (runs == ours && !fit) runs = of_arguments;
  if (!served(backward_calls, runs)) return of_torch();
  const Tensor stats = stats_of(lse);
  // A large log-sum-exp was rounded, as scores are where a mask is added to them: so must be what it is taken from.
  constexpr float kLarge = 1024.f;
  const auto* row_max = stats.const_data_ptr<float>();
  const auto is_large = [](float x) { return std::fabs(x) > kLarge; };
  if (!mask && std::any_of(row_max, row_max + lse.numel(), is_large)) mask = at::zeros({1, 1, 1, 1}, lse.options());
  const auto gradient = [](const Tensor& of) {
    const auto size = of.sizes();
    return with_huge_pages(at::cpu::empty({size[0], size[2], size[1], size[3]}, of.options())).transpose(1, 2);
  };
  const std::array gradients{gradient(query), gradient(key), gradient(value)};
  const c10::List<bool> needed{true, true, true, false, false, false, false, false};
  cross_attention::cross_attention_backward_into(gradients, grad, query, key, value, mask, {}, {}, {}, -1,
                                                 is_causal ? 0 : -1, false, 0., scale, 0., {}, true, false,
                                                 {out, stats}, needed);
  return {gradients[0], gradients[1], gradients[2]};
}

// torch warns of every kernel that another replaces, once; this one is asked for.
class NoWarnings : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void override_kernels() {
  NoWarnings none;
  const c10::WarningUtils::WarningHandlerGuard guard(&none);
  // Never freed: that would take kernels away under calls that run.
  auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_FN(attention));
  library->impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_FN(attention_backward));
}

PyObject* serve_torch_attention(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  static std::once_flag once;
  const bool on = arguments[0] == Py_True;
  if (on) std::call_once(once, override_kernels);
  serving.store(on, std::memory_order_relaxed);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* count_torch_attention(PyObject*, PyObject* const*, Py_ssize_t) {
  PyObject* const counts = PyList_New(0);
  const auto add = [&](const char* direction, const Counts& calls) {
    for (size_t i = 0; i < kinds_of_runs; ++i) {
      const auto count = static_cast<long long>(calls[i].load(std::memory_order_relaxed));
      PyObject* const entry = Py_BuildValue("(szL)", direction, kReasons[i], count);
      PyList_Append(counts, entry);
      Py_DECREF(entry);
    }
  };
  add("forward", forward_calls);
  add("backward", backward_calls);
  return counts;
}

const Door serving_door("serve_torch_attention", serve_torch_attention);
const Door counting_door("count_torch_attention", count_torch_attention);

}  // namespace
}  // namespace mmk::torch_attention

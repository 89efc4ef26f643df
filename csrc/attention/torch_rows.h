// Tensors [B, H, L, features] as the attention core sees them, and what is done when a result is not finite.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/empty_strided_cpu_dispatch.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <optional>

#include "csrc/attention/attention.h"
#include "csrc/cpu/large_output.h"

namespace mmk {

inline Rows rows_of(const at::Tensor& t) {
  TORCH_INTERNAL_ASSERT(t.dim() == 4 && (t.size(3) <= 1 || t.stride(3) == 1 || t.numel() == 0));
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// With a last dim that is contiguous.
inline at::Tensor dense_rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

// Lengths, or words of a random state, as kernels read them: dense int64, whatever the layout they came in.
inline at::Tensor dense_integers(const at::Tensor& t) { return t.to(at::kLong).contiguous(); }
inline std::optional<at::Tensor> dense_integers(const std::optional<at::Tensor>& t) {
  return t ? std::optional(dense_integers(*t)) : std::nullopt;
}

// Whether a product of sizes can be counted in int64; sizes of expanded tensors are free. Said without a wrap.
inline bool is_countable(std::initializer_list<int64_t> sizes) {
  double product = 1.;
  for (const int64_t size : sizes) product *= static_cast<double>(size);
  return product < 0x1p63;
}

// The leading dims of a tensor, all but the last, from the outermost in memory to the innermost.
inline at::DimVector order_of(const at::Tensor& t) {
  at::DimVector order;
  order.resize(static_cast<size_t>(t.dim() - 1));
  std::iota(order.begin(), order.end(), int64_t{0});
  const size_t first = !order.empty() && t.stride(0) == 0 ? 1 : 0;  // an expanded batch stays outermost
  for (size_t i = first; i < order.size(); ++i) {                   // stable, of a handful
    for (size_t at = i; at > first && t.stride(order[at - 1]) < t.stride(order[at]); --at) {
      std::swap(order[at - 1], order[at]);
    }
  }
  return order;
}

// Dense, its leading dims in memory in the order of like's.
inline at::Tensor empty_in_order_of(const at::Tensor& like, at::IntArrayRef sizes) {
  const at::DimVector order = order_of(like);
  at::DimVector strides(sizes.size(), 1);
  int64_t step = sizes.back();
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[static_cast<size_t>(*dim)] = step;
    step *= sizes[static_cast<size_t>(*dim)];
  }
  return with_huge_pages(at::cpu::empty_strided(sizes, strides, like.options()));
}

// Of `like` where it is wanted, else without elements.
inline at::Tensor empty_gradient(bool wanted, const at::Tensor& like) {
  return wanted ? empty_in_order_of(like, like.sizes()) : at::cpu::empty({0}, like.options());
}

inline bool is_finite(const at::Tensor& t) {
  constexpr int64_t kFew = 4096;  // elements that are looked at sooner than torch is asked
  if (t.numel() > kFew || !t.is_non_overlapping_and_dense() || t.element_size() > 4) {
    return t.numel() == 0 || std::isfinite(at::sum(t, at::ScalarType::Float).item<float>());
  }
  const auto exponents_below = [&](auto bits, unsigned exponent) {
    const auto* p = static_cast<const decltype(bits)*>(t.const_data_ptr());
    unsigned most = 0;
    for (int64_t i = 0; i < t.numel(); ++i) most = std::max<unsigned>(most, p[i] & exponent);
    return most != exponent;
  };
  if (t.scalar_type() == at::kFloat) return exponents_below(uint32_t{}, 0x7f800000u);
  return exponents_below(uint16_t{}, t.scalar_type() == at::kHalf ? 0x7c00u : 0x7f80u);
}

// Keys of which K or V holds NaN or infinity, [B, Hkv, Lk]; zeros take their place. Undefined if there are none.
inline at::Tensor take_out_poison(at::Tensor& key, at::Tensor& value) {
  const at::Tensor bad = at::isfinite(key).all(-1).logical_and_(at::isfinite(value).all(-1)).logical_not_();
  if (!bad.any().item<bool>()) return {};
  key = key.masked_fill(bad.unsqueeze(-1), 0);
  value = value.masked_fill(bad.unsqueeze(-1), 0);
  return bad.contiguous();
}

inline const uint8_t* poison_data(const at::Tensor& bad) {
  return bad.defined() ? reinterpret_cast<const uint8_t*>(bad.const_data_ptr<bool>()) : nullptr;
}

}  // namespace mmk

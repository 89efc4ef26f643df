// Sources and what follows their product, from torch's tensors.
#pragma once

#include "csrc/concat/preactivation_cuda.cuh"
#include "csrc/concat/product_cuda.cuh"
#include "csrc/cuda/torch_stable.h"

namespace mmk::cuda {

/// Tensors of [rows, K_i], kMostSources at most.
inline Sources as_sources(const std::vector<Tensor>& xs) {
  Sources sources{};
  sources.count = int(xs.size());
  sources.rows = int(xs[0].size(0));
  for (int i = 0; i < sources.count; ++i) {
    sources.x[i] = data(xs[i]);
    sources.stride[i] = stride_or_zero(xs[i], 0);
    sources.width[i] = int(xs[i].size(1));
  }
  return sources;
}

/// The flags of [rows or 1, M] sources from one on.
inline Presence as_presence(const OptionalTensor& flags, int64_t first = 0) {
  if (!flags.has_value()) return {};
  return {data<uint8_t>(*flags) + first * flags->stride(1), stride_or_zero(*flags, 0), flags->stride(1)};
}

inline bool is_per_feature(const OptionalTensor& gate) { return gate.has_value() && gate->dim() > 0; }

/// The instance of a launch for the tensors' dtype and a tile of 128 or 64.
template <typename Function>
Function of_tile(const Tensor& t, int64_t tile, Function bf16_128, Function bf16_64, Function fp16_128,
                 Function fp16_64) {
  if (is_bf16(t)) return tile == 128 ? bf16_128 : bf16_64;
  return tile == 128 ? fp16_128 : fp16_64;
}
#define MMK_OF_TILE(t, tile, function) \
  of_tile(t, tile, function<Bf16, 128>, function<Bf16, 64>, function<Fp16, 128>, function<Fp16, 64>)

}  // namespace mmk::cuda

// The arguments of attention to few keys, from torch's tensors.
#pragma once

#include "csrc/attention/short_keys.cuh"
#include "csrc/cuda/torch_stable.h"

namespace mmk::cuda {

using Tensors = std::vector<Tensor>;

#define MMK_SHORT_KEYS                                                                                               \
  "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] lengths, int[] padded, Tensor? bias, Tensor? mask, float " \
  "scale, int tiles"

inline Rows rows(const Tensor& t) { return {data(t), {t.stride(0), t.stride(1), t.stride(2)}}; }
inline Rows rows(const OptionalTensor& t) { return t.has_value() ? rows(*t) : Rows{}; }

inline ShortKeys short_keys(const Tensor& query, const Tensors& keys, const Tensors& values, const Tensors& lengths,
                            const std::vector<int64_t>& padded, const OptionalTensor& bias, const OptionalTensor& mask,
                            double scale, int64_t tiles) {
  using torch::headeronly::ScalarType;
  ShortKeys p{};
  p.query = rows(query);
  p.segment_count = int(keys.size());
  for (size_t j = 0; j < keys.size(); ++j) {
    Segment& s = p.segments[j];
    const Rows k = rows(keys[j]), v = rows(values[j]);
    s.key = k.at;
    s.value = v.at;
    for (int i = 0; i < 3; ++i) s.key_strides[i] = k.strides[i], s.value_strides[i] = v.strides[i];
    s.length = int(keys[j].size(2));
    s.first = p.total;
    p.total += s.length;
  }
  for (size_t i = 0; i < padded.size(); ++i) p.segments[padded[i]].lengths = data<const int64_t>(lengths[i]);
  p.keys = (p.total + kStep - 1) / kStep * kStep;
  p.batch = int(query.size(0));
  p.heads = int(query.size(1));
  p.group = p.heads / int(keys[0].size(1));
  p.queries = int(query.size(2));
  p.dim = int(query.size(3));
  p.scale = float(scale);
  p.bias = data<const float>(bias);
  if (mask.has_value()) {
    p.mask = data(mask);
    for (int i = 0; i < 4; ++i) p.mask_strides[i] = stride_or_zero(*mask, i);
    p.mask_kind = mask->scalar_type() == ScalarType::Bool    ? MaskKind::kBool
                  : mask->scalar_type() == ScalarType::Float ? MaskKind::kFloat
                                                             : MaskKind::kElement;
  }
  p.tiles = int(tiles);
  return p;
}

}  // namespace mmk::cuda

// deformable_attention on the CPU, as torch sees it. Arguments were checked at the door
// (mmkernels/ops/deformable_attention): values [B, S_i, H, D], locations [B, Lq, H, K, 2], weights [B, Lq, H, K].
#include "csrc/deformable_attention/deformable_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"

namespace mmk::deformable_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call {
  std::vector<DeformableSource> sources;
  std::vector<DeformableLevel> levels;
  Tensor locations, weights, presence;
  DeformableParams params;

  Call(const at::TensorList& values, const Tensor& given_locations, const Tensor& given_weights,
       const OptionalTensor& given_presence, at::IntArrayRef shapes, at::IntArrayRef levels_of, at::IntArrayRef points,
       bool discrete)
      : locations(dense_behind_heads(given_locations, 2)), weights(given_weights) {
    DeformableParams& p = params;
    for (size_t source = 0; source < levels_of.size(); ++source) {
      const Tensor& value = values[source];
      TORCH_INTERNAL_ASSERT(value.numel() == 0 || value.size(3) <= 1 || value.stride(3) == 1);
      int64_t first_row = p.rows;
      for (int64_t i = 0; i < levels_of[source]; ++i) {
        const size_t level = levels.size();
        const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
        levels.push_back({height, width, first_row, static_cast<int64_t>(source), points[level]});
        first_row += height * width;
      }
      sources.push_back(
          {value.const_data_ptr(), value.stride(0), value.stride(1), value.stride(2), nullptr, false, value.size(1)});
      p.rows += value.size(1);
    }
    p.batch = weights.size(0);
    p.queries = weights.size(1);
    p.heads = weights.size(2);
    p.points = weights.size(3);
    p.width = values[0].size(3);
    p.dtype = floating_dtype_of("deformable_attention", values[0]);
    p.sources = sources.data();
    p.source_count = static_cast<int64_t>(sources.size());
    p.levels = levels.data();
    p.level_count = static_cast<int64_t>(levels.size());
    p.locations = samples(locations);
    p.weights = samples(weights);
    if (given_presence) {
      presence = given_presence->contiguous();
      p.presence = reinterpret_cast<const uint8_t*>(presence.const_data_ptr<bool>());
      p.presence_stride = presence.dim() == 2 ? presence.size(1) : 0;
    }
    p.discrete = discrete;
    const double sampled = static_cast<double>(weights.numel()) * (static_cast<double>(p.width) + 16.);
    p.workers = torch_workers(8. * sampled);
  }

 private:
  static Tensor dense_behind_heads(const Tensor& t, int64_t last) {
    return t.size(3) <= 1 || t.stride(3) == last ? t : t.contiguous();
  }
  static DeformableSamples samples(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), floating_dtype_of("deformable_attention", t)};
  }
};

Tensor forward(at::TensorList values, const Tensor& locations, const Tensor& weights, const OptionalTensor& presence,
               at::IntArrayRef shapes, at::IntArrayRef levels, at::IntArrayRef points, bool discrete, bool) {
  Call call(values, locations, weights, presence, shapes, levels, points, discrete);
  DeformableParams& p = call.params;
  const Tensor out = with_huge_pages(at::cpu::empty({p.batch, p.queries, p.heads * p.width}, values[0].options()));
  p.out = out.data_ptr();
  p.stream_out = worth_streaming(static_cast<int64_t>(out.nbytes()));
  if (out.numel() > 0) MMK_DISPATCH(deformable_attention_forward)(p);
  return out;
}

std::vector<Tensor> backward(at::TensorList grads, at::TensorList values, const Tensor& locations,
                             const Tensor& weights, const OptionalTensor& presence, at::IntArrayRef shapes,
                             at::IntArrayRef levels, at::IntArrayRef points, bool discrete, at::TensorList,
                             const c10::List<bool>& needed) {
  Call call(values, locations, weights, presence, shapes, levels, points, discrete);
  DeformableParams& p = call.params;
  std::vector<Tensor> result;
  for (size_t source = 0; source < values.size(); ++source) {
    const bool wanted = needed[source];
    result.push_back(empty_if(values[source], wanted));
    if (!wanted) continue;
    call.sources[source].grad = result.back().data_ptr();
    call.sources[source].stream = worth_streaming(static_cast<int64_t>(result.back().nbytes()));
    p.needs_values = true;
  }
  for (const Tensor* samples : {&locations, &weights}) result.push_back(empty_if(*samples, needed[result.size()]));
  result.push_back(at::cpu::empty({0}, weights.options()));  // of the presence
  if (needed[values.size()]) p.grad_locations = result[values.size()].data_ptr();
  if (needed[values.size() + 1]) p.grad_weights = result[values.size() + 1].data_ptr();
  p.stream_samples = worth_streaming(static_cast<int64_t>(locations.nbytes()));
  if (grads[0].numel() == 0) {
    for (const Tensor& t : result) t.zero_();
    return result;
  }
  TORCH_INTERNAL_ASSERT(grads[0].numel() == 0 || grads[0].size(2) <= 1 || grads[0].stride(2) == 1);
  p.grad_out = grads[0].const_data_ptr();
  p.grad_batch_stride = grads[0].stride(0);
  p.grad_query_stride = grads[0].stride(1);
  MMK_DISPATCH(deformable_attention_backward)(p);
  return result;
}

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_deformable_attention_fwd(Tensor[] values, Tensor locations, Tensor weights, Tensor? presence, int[] shapes, "
      "int[] levels, int[] points, bool discrete, bool training) -> Tensor");
  m.def(
      "_deformable_attention_bwd(Tensor[] grads, Tensor[] values, Tensor locations, Tensor weights, Tensor? presence, "
      "int[] shapes, int[] levels, int[] points, bool discrete, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_deformable_attention_fwd", forward);
  m.impl("_deformable_attention_bwd", backward);
}

}  // namespace
}  // namespace mmk::deformable_attention

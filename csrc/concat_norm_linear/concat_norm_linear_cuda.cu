#include "csrc/concat/sources_cuda.h"
#include "csrc/concat_norm_linear/concat_norm_linear_cuda.cuh"

namespace mmk::cuda {
namespace {

int total_width(const Sources& sources) {
  int width = 0;
  for (int i = 0; i < sources.count; ++i) width += sources.width[i];
  return width;
}

/// Statistics, then the product: they are [rows, 2] and written here.
void forward(Tensor weight, std::vector<Tensor> xs, Tensor norm_weight, OptionalTensor norm_bias, OptionalTensor bias,
             bool centred, double eps, int64_t activation, int64_t tile, Tensor statistics,
             OptionalTensor preactivation, Tensor y, int64_t stream) {
  const Sources sources = as_sources(xs);
  Pair* const pairs = data<Pair>(statistics);
  const auto launch =
      is_bf16(weight) ? launch_concat_norm_linear_statistics<Bf16> : launch_concat_norm_linear_statistics<Fp16>;
  launch({sources, pairs, total_width(sources), float(eps), centred}, as_stream(stream));
  const LinearEpilogue epilogue{data(bias),
                                nullptr,
                                nullptr,
                                data(preactivation),
                                data(y),
                                0,
                                sources.rows,
                                int(weight.size(0)),
                                Activation(activation),
                                false};
  const ConcatNormLinear p{sources,      data(norm_weight),         data(norm_bias), pairs,
                           data(weight), stride_or_zero(weight, 0), epilogue};
  MMK_OF_TILE(weight, tile, launch_concat_norm_linear_forward)(p, as_stream(stream));
}

void means(Tensor a, std::vector<Tensor> xs, Tensor norm_weight, bool centred, Tensor statistics, Tensor means,
           int64_t stream) {
  const GradientMeans p{as_sources(xs), data(a), data(norm_weight), data<Pair>(statistics), data<Pair>(means),
                        int(a.size(1)), centred};
  const auto launch = is_bf16(a) ? launch_concat_norm_linear_means<Bf16> : launch_concat_norm_linear_means<Fp16>;
  launch(p, as_stream(stream));
}

/// `dxs`: empty where a source's gradient is not wanted.
void gradients(Tensor norm_weight, std::vector<Tensor> xs, OptionalTensor norm_bias, OptionalTensor a,
               Tensor statistics, OptionalTensor means, int64_t run, std::vector<Tensor> dxs, OptionalTensor n,
               OptionalTensor dnorm_weight, OptionalTensor dnorm_bias, int64_t stream) {
  SourceGradients p{};
  p.sources = as_sources(xs);
  p.a = data(a);
  p.norm_weight = data(norm_weight);
  p.norm_bias = data(norm_bias);
  p.statistics = data<Pair>(statistics);
  p.means = data<Pair>(means);
  for (int i = 0; i < p.sources.count; ++i) p.dx[i] = dxs[i].numel() ? data(dxs[i]) : nullptr;
  p.n = data(n);
  p.dnorm_weight = data<float>(dnorm_weight);
  p.dnorm_bias = data<float>(dnorm_bias);
  p.width = total_width(p.sources);
  p.run = int(run);
  const auto launch =
      is_bf16(norm_weight) ? launch_concat_norm_linear_gradients<Bf16> : launch_concat_norm_linear_gradients<Fp16>;
  launch(p, as_stream(stream));
}

MMK_REGISTER("concat_norm_linear_fwd",
             "(Tensor weight, Tensor[] xs, Tensor norm_weight, Tensor? norm_bias, Tensor? bias, bool centred, "
             "float eps, int activation, int tile, Tensor(a!) statistics, Tensor(b!)? preactivation, Tensor(c!) y, "
             "int stream) -> ()",
             forward)
MMK_REGISTER("concat_norm_linear_means",
             "(Tensor a, Tensor[] xs, Tensor norm_weight, bool centred, Tensor statistics, Tensor(a!) means, "
             "int stream) -> ()",
             means)
MMK_REGISTER("concat_norm_linear_grads",
             "(Tensor norm_weight, Tensor[] xs, Tensor? norm_bias, Tensor? a, Tensor statistics, Tensor? means, "
             "int run, Tensor(a!)[] dxs, Tensor(b!)? n, Tensor(c!)? dnorm_weight, Tensor(d!)? dnorm_bias, "
             "int stream) -> ()",
             gradients)

}  // namespace
}  // namespace mmk::cuda

#include "csrc/concat_tokens/concat_tokens_cuda.cuh"
#include "csrc/cuda/torch_stable.h"

namespace mmk::cuda {
namespace {

ConcatTokensDtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Float) return ConcatTokensDtype::kFloat;
  return is_bf16(t) ? ConcatTokensDtype::kBf16 : ConcatTokensDtype::kFp16;
}

/// The arguments of both passes, without gradients.
ConcatTokens arguments(const std::vector<Tensor>& xs, const OptionalTensor& type, const std::vector<Tensor>& positions,
                       const std::vector<int64_t>& position_sources, int64_t norm, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, int64_t run, int64_t share) {
  ConcatTokens p{};
  for (const Tensor& x : xs) {
    ConcatTokensSource& source = p.sources[p.count++];
    source.x = data(x);
    source.x_batch = x.stride(0);
    source.x_token = x.stride(1);
    source.length = int(x.size(1));
    source.start = p.total;
    source.first_team = p.teams;
    p.total += source.length;
    p.teams += int((source.length + run - 1) / run);
  }
  for (size_t i = 0; i < positions.size(); ++i) {
    ConcatTokensSource& source = p.sources[position_sources[i]];
    source.position = data(positions[i]);
    source.position_token = positions[i].stride(0);
  }
  p.type = data(type);
  p.type_source = type.has_value() ? type->stride(0) : 0;
  p.weight = data(weight);
  p.bias = data(bias);
  p.batch = int(xs[0].size(0));
  p.features = int(xs[0].size(2));
  p.run = int(run);
  p.share = int(share);
  p.eps = float(eps);
  p.norm = Norm(norm);
  return p;
}

void forward(Tensor out, std::vector<Tensor> xs, OptionalTensor type, std::vector<Tensor> positions,
             std::vector<int64_t> position_sources, int64_t norm, OptionalTensor weight, OptionalTensor bias,
             double eps, int64_t run, int64_t share, int64_t stream) {
  const ConcatTokens p = arguments(xs, type, positions, position_sources, norm, weight, bias, eps, run, share);
  const auto launch = is_bf16(xs[0]) ? launch_concat_tokens_forward<Bf16> : launch_concat_tokens_forward<Fp16>;
  launch(p, data(out), dtype_of(out), as_stream(stream));
}

void backward(Tensor g, std::vector<Tensor> xs, OptionalTensor type, std::vector<Tensor> positions,
              std::vector<int64_t> position_sources, int64_t norm, OptionalTensor weight, OptionalTensor bias,
              double eps, int64_t run, int64_t share, std::vector<Tensor> dxs, std::vector<Tensor> dpositions,
              OptionalTensor dtypes, OptionalTensor dweight, OptionalTensor dbias, int64_t stream) {
  ConcatTokens p = arguments(xs, type, positions, position_sources, norm, weight, bias, eps, run, share);
  for (size_t i = 0; i < dxs.size(); ++i) p.sources[i].dx = data(dxs[i]);
  for (size_t i = 0; i < dpositions.size(); ++i) p.sources[position_sources[i]].dposition = data(dpositions[i]);
  // Not asked for, or of a source without tokens, is empty; the dtype is that of any other.
  ConcatTokensDtype of_position = ConcatTokensDtype::kFloat;
  for (const Tensor& t : dpositions)
    if (t.numel() > 0) of_position = dtype_of(t);
  const ConcatTokensGradients d{data(g),     g.stride(0),         g.stride(1),          dtype_of(g),
                                of_position, data<float>(dtypes), data<float>(dweight), data<float>(dbias)};
  const auto launch = is_bf16(xs[0]) ? launch_concat_tokens_backward<Bf16> : launch_concat_tokens_backward<Fp16>;
  launch(p, d, as_stream(stream));
}

MMK_REGISTER(
    "concat_tokens_fwd",
    "(Tensor(a!) out, Tensor[] xs, Tensor? type_embedding, Tensor[] positions, int[] position_sources, int norm, "
    "Tensor? weight, Tensor? bias, float eps, int run, int share, int stream) -> ()",
    forward)
MMK_REGISTER("concat_tokens_bwd",
             "(Tensor g, Tensor[] xs, Tensor? type_embedding, Tensor[] positions, int[] position_sources, int norm, "
             "Tensor? weight, Tensor? bias, float eps, int run, int share, Tensor(a!)[] dxs, Tensor(b!)[] dpositions, "
             "Tensor(c!)? dtypes, Tensor(d!)? dweight, Tensor(e!)? dbias, int stream) -> ()",
             backward)

}  // namespace
}  // namespace mmk::cuda

#include "csrc/concat/sources_cuda.h"
#include "csrc/concat_linear/concat_linear_cuda.cuh"

namespace mmk::cuda {
namespace {

void forward(Tensor weight, std::vector<Tensor> xs, OptionalTensor bias, int64_t activation, OptionalTensor presence,
             OptionalTensor residual, OptionalTensor gate, int64_t tile, OptionalTensor preactivation, Tensor y,
             int64_t stream) {
  const Sources sources = as_sources(xs);
  const LinearEpilogue epilogue{data(bias),
                                data(gate),
                                data(residual),
                                data(preactivation),
                                data(y),
                                residual.has_value() ? stride_or_zero(*residual, 0) : 0,
                                sources.rows,
                                int(weight.size(0)),
                                Activation(activation),
                                is_per_feature(gate)};
  const ConcatLinear p{sources, as_presence(presence), data(weight), stride_or_zero(weight, 0), epilogue};
  MMK_OF_TILE(weight, tile, launch_concat_linear_forward)(p, as_stream(stream));
}

void preactivation_gradients(Tensor dy, OptionalTensor kept, OptionalTensor gate, int64_t activation, bool from_output,
                             int64_t run, OptionalTensor dz, OptionalTensor dbias, OptionalTensor dgate,
                             int64_t stream) {
  const PreactivationGradient p{data(dy),
                                data(kept),
                                data(gate),
                                data(dz),
                                data<float>(dbias),
                                data<float>(dgate),
                                stride_or_zero(dy, 0),
                                int(dy.size(0)),
                                int(dy.size(1)),
                                int(run),
                                Activation(activation),
                                is_per_feature(gate),
                                from_output};
  const auto launch = is_bf16(dy) ? launch_preactivation_gradient<Bf16> : launch_preactivation_gradient<Fp16>;
  launch(p, as_stream(stream));
}

void input_gradient(Tensor dz, Tensor weight, Tensor presence, int64_t source, int64_t tile, Tensor dx,
                    int64_t stream) {
  const InputGradient p{
      data(dz), data(weight),    stride_or_zero(dz, 0), stride_or_zero(weight, 0), as_presence(presence, source),
      data(dx), int(dz.size(0)), int(weight.size(0)),   int(weight.size(1))};
  MMK_OF_TILE(dz, tile, launch_input_gradient)(p, as_stream(stream));
}

void weight_gradient(Tensor dz, Tensor x, Tensor presence, int64_t source, int64_t tile, int64_t share, Tensor dweight,
                     int64_t stream) {
  const bool shared = dweight.dim() == 3;
  const WeightGradient p{data(dz),
                         data(x),
                         stride_or_zero(dz, 0),
                         stride_or_zero(x, 0),
                         as_presence(presence, source),
                         data(dweight),
                         dweight.stride(shared ? 1 : 0),
                         int(dz.size(0)),
                         int(dz.size(1)),
                         int(x.size(1)),
                         int(share),
                         shared ? int(dweight.size(0)) : 1};
  MMK_OF_TILE(dz, tile, launch_weight_gradient)(p, as_stream(stream));
}

MMK_REGISTER("concat_linear_fwd",
             "(Tensor weight, Tensor[] xs, Tensor? bias, int activation, Tensor? presence, Tensor? residual, "
             "Tensor? gate, int tile, Tensor(a!)? preactivation, Tensor(b!) y, int stream) -> ()",
             forward)
MMK_REGISTER("concat_linear_dz",
             "(Tensor dy, Tensor? kept, Tensor? gate, int activation, bool from_output, int run, Tensor(a!)? dz, "
             "Tensor(b!)? dbias, Tensor(c!)? dgate, int stream) -> ()",
             preactivation_gradients)
MMK_REGISTER("concat_linear_dx",
             "(Tensor dz, Tensor weight, Tensor presence, int source, int tile, Tensor(a!) dx, int stream) -> ()",
             input_gradient)
MMK_REGISTER("concat_linear_dw",
             "(Tensor dz, Tensor x, Tensor presence, int source, int tile, int share, Tensor(a!) dweight, int stream) "
             "-> ()",
             weight_gradient)

}  // namespace
}  // namespace mmk::cuda

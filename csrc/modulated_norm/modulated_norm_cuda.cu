#include "csrc/cuda/torch_stable.h"
#include "csrc/modulated_norm/modulated_norm_cuda.cuh"

namespace mmk::cuda {
namespace {

ModulatedNorm arguments(const Tensor& x, const Tensor& shift, const Tensor& scale, const OptionalTensor& weight,
                        const OptionalTensor& bias, int64_t norm, double eps, int64_t run) {
  return {data(x),
          data(shift),
          data(scale),
          data(weight),
          data(bias),
          int(x.size(0)),
          int(x.size(1)),
          int(x.size(2)),
          int(run),
          x.stride(0),
          x.stride(1),
          stride_or_zero(shift, 0),
          stride_or_zero(shift, 1),
          stride_or_zero(scale, 0),
          stride_or_zero(scale, 1),
          float(eps),
          Norm(norm),
          shift.size(1) != 1};
}

void forward(Tensor x, Tensor shift, Tensor scale, OptionalTensor weight, OptionalTensor bias, int64_t norm, double eps,
             int64_t run, Tensor y, int64_t stream) {
  const ModulatedNorm p = arguments(x, shift, scale, weight, bias, norm, eps, run);
  const auto launch = is_bf16(x) ? launch_modulated_norm_forward<Bf16> : launch_modulated_norm_forward<Fp16>;
  launch(p, data(y), as_stream(stream));
}

void backward(Tensor g, Tensor x, Tensor shift, Tensor scale, OptionalTensor weight, OptionalTensor bias, int64_t norm,
              double eps, int64_t run, OptionalTensor dx, OptionalTensor dshift, OptionalTensor dscale,
              OptionalTensor dweight, OptionalTensor dbias, int64_t stream) {
  const ModulatedNorm p = arguments(x, shift, scale, weight, bias, norm, eps, run);
  const ModulatedNormGradients d{data(g),      g.stride(0),  g.stride(1),          data(dx),
                                 data(dshift), data(dscale), data<float>(dweight), data<float>(dbias)};
  const auto launch = is_bf16(x) ? launch_modulated_norm_backward<Bf16> : launch_modulated_norm_backward<Fp16>;
  launch(p, d, as_stream(stream));
}

MMK_REGISTER(
    "modulated_norm_fwd",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, int norm, float eps, int run, Tensor(a!) y, "
    "int stream) -> ()",
    forward)
MMK_REGISTER(
    "modulated_norm_bwd",
    "(Tensor g, Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, int norm, float eps, int run, "
    "Tensor(a!)? dx, Tensor(b!)? dshift, Tensor(c!)? dscale, Tensor(d!)? dweight, Tensor(e!)? dbias, int stream) -> ()",
    backward)

}  // namespace
}  // namespace mmk::cuda

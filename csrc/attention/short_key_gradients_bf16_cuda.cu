#include "csrc/attention/short_key_gradients_cuda.cuh"

namespace mmk::cuda {

void launch_short_key_gradients_bf16(const ShortKeys& p, const ShortKeyGradient& d, const ShortKeySums& sums,
                                     Stream stream) {
  MMK_FOR_HEAD_DIM(launch_short_key_gradients, Bf16, p.dim, p, d, sums, stream);
}

}  // namespace mmk::cuda

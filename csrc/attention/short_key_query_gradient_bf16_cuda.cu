#include "csrc/attention/short_key_query_gradient_cuda.cuh"

namespace mmk::cuda {

void launch_short_key_query_gradient_bf16(const ShortKeys& p, const ShortKeyGradient& d, const Rows& dquery,
                                          float* dscores, Stream stream) {
  MMK_FOR_HEAD_DIM(launch_short_key_query_gradient, Bf16, p.dim, p, d, dquery, dscores, stream);
}

}  // namespace mmk::cuda

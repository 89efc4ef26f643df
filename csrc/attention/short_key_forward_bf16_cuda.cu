#include "csrc/attention/short_key_forward_cuda.cuh"

namespace mmk::cuda {

void launch_short_key_forward_bf16(const ShortKeys& p, const ShortKeyOutput& o, Stream stream) {
  MMK_FOR_HEAD_DIM(launch_short_key_forward, Bf16, p.dim, p, o, stream);
}

}  // namespace mmk::cuda

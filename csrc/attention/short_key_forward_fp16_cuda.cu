#include "csrc/attention/short_key_forward_cuda.cuh"

namespace mmk::cuda {

void launch_short_key_forward_fp16(const ShortKeys& p, const ShortKeyOutput& o, Stream stream) {
  MMK_FOR_HEAD_DIM(launch_short_key_forward, Fp16, p.dim, p, o, stream);
}

}  // namespace mmk::cuda

#include "csrc/attention/short_key_forward_cuda.cuh"
#include "csrc/attention/short_keys_torch.h"

namespace mmk::cuda {
namespace {

void forward(Tensor query, Tensors keys, Tensors values, Tensors lengths, std::vector<int64_t> padded,
             OptionalTensor bias, OptionalTensor mask, double scale, int64_t tiles, Tensor out, OptionalTensor row_max,
             OptionalTensor log_sum, int64_t stream) {
  const ShortKeys p = short_keys(query, keys, values, lengths, padded, bias, mask, scale, tiles);
  const ShortKeyOutput o{rows(out), data<float>(row_max), data<float>(log_sum)};
  MMK_FOR_DTYPE_AND_HEAD_DIM(launch_short_key_forward, query, p, o, as_stream(stream));
}

MMK_REGISTER("short_key_attention",
             "(" MMK_SHORT_KEYS ", Tensor(a!) out, Tensor(b!)? row_max, Tensor(c!)? log_sum, int stream) -> ()",
             forward)

}  // namespace
}  // namespace mmk::cuda

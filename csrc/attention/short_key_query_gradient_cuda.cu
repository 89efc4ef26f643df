#include "csrc/attention/short_key_query_gradient_cuda.cuh"
#include "csrc/attention/short_keys_torch.h"

namespace mmk::cuda {
namespace {

void query_gradient(Tensor query, Tensors keys, Tensors values, Tensors lengths, std::vector<int64_t> padded,
                    OptionalTensor bias, OptionalTensor mask, double scale, int64_t tiles, Tensor grad_out, Tensor out,
                    Tensor row_max, Tensor log_sum, OptionalTensor grad_log_sum, Tensor deltas, OptionalTensor dquery,
                    OptionalTensor dscores, bool exact, int64_t stream) {
  const ShortKeys p = short_keys(query, keys, values, lengths, padded, bias, mask, scale, tiles);
  const ShortKeyGradient d{rows(grad_out),
                           rows(out),
                           data<const float>(row_max),
                           data<const float>(log_sum),
                           data<const float>(grad_log_sum),
                           data<float>(deltas),
                           exact};
  MMK_FOR_DTYPE_AND_HEAD_DIM(launch_short_key_query_gradient, query, p, d, rows(dquery), data<float>(dscores),
                             as_stream(stream));
}

MMK_REGISTER("short_key_attention_query_gradient",
             "(" MMK_SHORT_KEYS
             ", Tensor grad_out, Tensor out, Tensor row_max, Tensor log_sum, Tensor? grad_log_sum, Tensor(a!) deltas, "
             "Tensor(b!)? "
             "dquery, Tensor(c!)? dscores, bool exact, int stream) -> ()",
             query_gradient)

}  // namespace
}  // namespace mmk::cuda

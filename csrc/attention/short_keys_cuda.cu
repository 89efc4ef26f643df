// Attention to few keys as torch's ops; the kernels of each pass and dtype, for every head dim and architecture, are a
// unit of their own.
#include "csrc/attention/short_key_forward_cuda.cuh"
#include "csrc/attention/short_key_gradients_cuda.cuh"
#include "csrc/attention/short_key_query_gradient_cuda.cuh"
#include "csrc/attention/short_keys_torch.h"

namespace mmk::cuda {
namespace {

void forward(Tensor query, Tensors keys, Tensors values, Tensors lengths, std::vector<int64_t> padded,
             OptionalTensor bias, OptionalTensor mask, double scale, int64_t tiles, Tensor out, OptionalTensor row_max,
             OptionalTensor log_sum, int64_t stream) {
  const ShortKeys p = short_keys(query, keys, values, lengths, padded, bias, mask, scale, tiles);
  const ShortKeyOutput o{rows(out), data<float>(row_max), data<float>(log_sum)};
  const auto launch = is_bf16(query) ? launch_short_key_forward_bf16 : launch_short_key_forward_fp16;
  launch(p, o, as_stream(stream));
}

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
  const auto launch = is_bf16(query) ? launch_short_key_query_gradient_bf16 : launch_short_key_query_gradient_fp16;
  launch(p, d, rows(dquery), data<float>(dscores), as_stream(stream));
}

void gradients(Tensor query, Tensors keys, Tensors values, Tensors lengths, std::vector<int64_t> padded,
               OptionalTensor bias, OptionalTensor mask, double scale, int64_t tiles, Tensor grad_out, Tensor row_max,
               Tensor log_sum, Tensor deltas, OptionalTensor dkey, OptionalTensor dvalue, OptionalTensor dadded,
               int64_t first_share, int64_t stream) {
  const ShortKeys p = short_keys(query, keys, values, lengths, padded, bias, mask, scale, tiles);
  const ShortKeyGradient d{rows(grad_out),      Rows{}, data<const float>(row_max), data<const float>(log_sum), nullptr,
                           data<float>(deltas), false};
  const ShortKeySums sums{data<float>(dkey), data<float>(dvalue), data<float>(dadded), int(first_share)};
  const auto launch = is_bf16(query) ? launch_short_key_gradients_bf16 : launch_short_key_gradients_fp16;
  launch(p, d, sums, as_stream(stream));
}

void total(Tensor sums, Tensor out, int64_t first, double factor, int64_t stream) {
  const ShortKeyTotal t{data<const float>(sums), rows(out),         int(sums.size(0)),
                        int(sums.size(1)),       int(sums.size(2)), int(sums.size(2) / out.size(1)),
                        int(sums.size(3)),       int(first),        int(out.size(2)),
                        int(out.size(3)),        float(factor)};
  const auto launch = is_bf16(out) ? launch_short_key_total<Bf16> : launch_short_key_total<Fp16>;
  launch(t, as_stream(stream));
}

MMK_REGISTER("short_key_attention",
             "(" MMK_SHORT_KEYS ", Tensor(a!) out, Tensor(b!)? row_max, Tensor(c!)? log_sum, int stream) -> ()",
             forward)
MMK_REGISTER("short_key_attention_query_gradient",
             "(" MMK_SHORT_KEYS
             ", Tensor grad_out, Tensor out, Tensor row_max, Tensor log_sum, Tensor? grad_log_sum, Tensor(a!) deltas, "
             "Tensor(b!)? dquery, Tensor(c!)? dscores, bool exact, int stream) -> ()",
             query_gradient)
MMK_REGISTER("short_key_attention_gradients",
             "(" MMK_SHORT_KEYS
             ", Tensor grad_out, Tensor row_max, Tensor log_sum, Tensor deltas, Tensor(a!)? dkey, Tensor(b!)? dvalue, "
             "Tensor(c!)? dadded, int first_share, int stream) -> ()",
             gradients)
MMK_REGISTER("short_key_attention_total", "(Tensor sums, Tensor(a!) out, int first, float factor, int stream) -> ()",
             total)

}  // namespace
}  // namespace mmk::cuda

#include "csrc/attention/short_key_gradients_cuda.cuh"
#include "csrc/attention/short_keys_torch.h"

namespace mmk::cuda {
namespace {

void gradients(Tensor query, Tensors keys, Tensors values, Tensors lengths, std::vector<int64_t> padded,
               OptionalTensor bias, OptionalTensor mask, double scale, int64_t tiles, Tensor grad_out, Tensor row_max,
               Tensor log_sum, Tensor deltas, OptionalTensor dkey, OptionalTensor dvalue, OptionalTensor dadded,
               int64_t first_share, int64_t stream) {
  const ShortKeys p = short_keys(query, keys, values, lengths, padded, bias, mask, scale, tiles);
  const ShortKeyGradient d{rows(grad_out),      Rows{}, data<const float>(row_max), data<const float>(log_sum), nullptr,
                           data<float>(deltas), false};
  const ShortKeySums sums{data<float>(dkey), data<float>(dvalue), data<float>(dadded), int(first_share)};
  MMK_FOR_DTYPE_AND_HEAD_DIM(launch_short_key_gradients, query, p, d, sums, as_stream(stream));
}

void total(Tensor sums, Tensor out, int64_t first, double factor, int64_t stream) {
  const ShortKeyTotal t{data<const float>(sums), rows(out),         int(sums.size(0)),
                        int(sums.size(1)),       int(sums.size(2)), int(sums.size(2) / out.size(1)),
                        int(sums.size(3)),       int(first),        int(out.size(2)),
                        int(out.size(3)),        float(factor)};
  const auto launch = is_bf16(out) ? launch_short_key_total<Bf16> : launch_short_key_total<Fp16>;
  launch(t, as_stream(stream));
}

MMK_REGISTER("short_key_attention_gradients",
             "(" MMK_SHORT_KEYS
             ", Tensor grad_out, Tensor row_max, Tensor log_sum, Tensor deltas, Tensor(a!)? dkey, Tensor(b!)? dvalue, "
             "Tensor(c!)? "
             "dadded, int first_share, int stream) -> ()",
             gradients)
MMK_REGISTER("short_key_attention_total", "(Tensor sums, Tensor(a!) out, int first, float factor, int stream) -> ()",
             total)

}  // namespace
}  // namespace mmk::cuda

// bidirectional_cross_attention on the CPU, as torch sees it. Arguments were checked at the door
// (mmkernels/ops/bidirectional_cross_attention): x_query and x_value [B, H, Lx, ·], y_key and y_value [B, H, Ly, ·],
// masks [B, L], true where a token is real.
#include "csrc/bidirectional_cross_attention/bidirectional_cross_attention.h"

#include <ATen/ops/masked_fill.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::bidirectional_cross_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kName = "bidirectional_cross_attention";

// What is saved, [3, B, H, L], as every backend means it: row_max and log_sum in natural logarithms, -inf where there
// is nothing to attend to, and what rounds row_max, of which the kernels' shift, an exponent of 2, is found again to
// the last bit. Other backends round nothing: there log2_sum takes what rounds the shift.
void to_natural(const SoftmaxStats& stats, int64_t count) {
  float* const remainders = stats.log2_sum + count;
  for (int64_t i = 0; i < count; ++i) {
    float &top = stats.shift[i], &sum = stats.log2_sum[i];
    remainders[i] = 0.f;
    if (sum == std::numeric_limits<float>::infinity()) {
      top = sum = -sum;
      continue;
    }
    const double natural = static_cast<double>(top) * M_LN2;
    top = static_cast<float>(natural);
    remainders[i] = static_cast<float>(natural - static_cast<double>(top));
    sum = static_cast<float>(static_cast<double>(sum) * M_LN2);
  }
}

void to_exponents(const SoftmaxStats& stats, int64_t count) {
  constexpr double kMost = std::numeric_limits<float>::max();
  const float* const remainders = stats.log2_sum + count;
  for (int64_t i = 0; i < count; ++i) {
    float &top = stats.shift[i], &sum = stats.log2_sum[i];
    if (top == -std::numeric_limits<float>::infinity()) {
      top = 0.f, sum = std::numeric_limits<float>::infinity();
      continue;
    }
    const double exponent = (static_cast<double>(top) + static_cast<double>(remainders[i])) * M_LOG2E;
    top = static_cast<float>(std::max(-kMost, std::min(kMost, exponent)));
    const double rounded = remainders[i] == 0.f ? exponent - static_cast<double>(top) : 0.;
    sum = static_cast<float>(static_cast<double>(sum) * M_LOG2E + rounded);
  }
}

// What belongs to x, or to y: `query` is x_query or y_key.
struct Side {
  Tensor query, value, mask;  // mask undefined: all tokens are real
  Tensor out, stats, grad_out, grad_query, grad_value;

  Side(const Tensor& query, const Tensor& value, const OptionalTensor& mask)
      : query(query), value(value), mask(mask ? mask->contiguous() : Tensor()) {}

  int64_t length() const { return query.size(2); }
  const uint8_t* mask_data() const {
    return mask.defined() ? reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()) : nullptr;
  }
  SoftmaxStats stats_data() const {
    if (!stats.defined() || stats.numel() == 0) return {};
    float* const data = stats.data_ptr<float>();
    return {data, data + stats.numel() / 3};
  }
  // What is not finite in a padded token counts as zero. Whether there was any.
  bool clean_padding() {
    if (!mask.defined()) return false;
    bool any = false;
    const Tensor padded = mask.logical_not().unsqueeze(1).unsqueeze(-1);
    const auto clean = [&](Tensor& t, Tensor& bad) {
      bad = at::isfinite(t).logical_not_().logical_and_(padded);
      if (!bad.any().item<bool>()) return;
      t = t.masked_fill(bad, 0);
      any = true;
    };
    clean(query, bad_query_);
    clean(value, bad_value_);
    return any;
  }
  void clear_padded_gradients() const {
    const auto clear = [](const Tensor& grad, const Tensor& bad) {
      if (grad.defined() && grad.numel() > 0 && bad.defined()) grad.masked_fill_(bad, 0);
    };
    clear(grad_query, bad_query_);
    clear(grad_value, bad_value_);
  }

 private:
  Tensor bad_query_, bad_value_;
};

Rows rows_if(const Tensor& t) { return t.defined() && t.numel() > 0 ? rows_of(t) : Rows{}; }

struct Call {
  Side x, y;
  double scale, clamp;

  Call(const Tensor& x_query, const Tensor& y_key, const Tensor& x_value, const Tensor& y_value,
       const OptionalTensor& x_mask, const OptionalTensor& y_mask, std::optional<double> scale,
       std::optional<double> clamp)
      : x(x_query, x_value, x_mask),
        y(y_key, y_value, y_mask),
        clamp(clamp.value_or(std::numeric_limits<double>::infinity())) {
    const int64_t features = x_query.size(3);
    this->scale = scale.value_or(features == 0 ? 1. : 1. / std::sqrt(static_cast<double>(features)));
  }

  bool has_no_scores() const {
    return x.query.size(0) == 0 || x.query.size(1) == 0 || x.length() == 0 || y.length() == 0;
  }
  bool is_masked() const { return x.mask.defined() || y.mask.defined(); }
  bool clean_padding() {
    const bool of_x = x.clean_padding();
    return y.clean_padding() || of_x;
  }

  // The longer side is that of the queries: kernels have it in their lanes.
  BidirectionalParams params(double products) const {
    const bool swaps = y.length() > x.length();
    const Side &lanes = swaps ? y : x, &keys = swaps ? x : y;
    BidirectionalParams b;
    AttentionParams& p = b.attention;
    p.batch = x.query.size(0);
    p.heads = p.kv_heads = x.query.size(1);
    p.head_dim = x.query.size(3);
    p.value_dim = x.value.size(3);
    p.dtype = floating_dtype_of(kName, x.query);
    p.scale = static_cast<float>(scale);
    p.query_segments = p.key_segments = 1;
    QuerySegment& q = p.queries[0];
    q.query = rows_of(lanes.query);
    q.out = rows_if(lanes.out);
    q.grad_out = rows_if(lanes.grad_out);
    q.grad_query = rows_if(lanes.grad_query);
    q.length = lanes.length();
    KeySegment& k = p.keys[0];
    k.key = rows_of(keys.query);
    k.value = rows_of(keys.value);
    k.grad_key = rows_if(keys.grad_query);
    k.grad_value = rows_if(keys.grad_value);
    k.length = keys.length();
    b.x_value = rows_of(lanes.value);
    b.grad_x_value = rows_if(lanes.grad_value);
    b.y_out = rows_if(keys.out);
    b.grad_y_out = rows_if(keys.grad_out);
    b.x_mask = lanes.mask_data();
    b.y_mask = keys.mask_data();
    b.clamp = static_cast<float>(clamp);
    b.x = lanes.stats_data();
    b.y = keys.stats_data();
    p.workers = torch_workers(products * static_cast<double>(p.batch * p.heads) * static_cast<double>(q.length) *
                              static_cast<double>(k.length) * static_cast<double>(p.head_dim + 2 * p.value_dim));
    return b;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_query, const Tensor& y_key, const Tensor& x_value,
                                                   const Tensor& y_value, const OptionalTensor& x_mask,
                                                   const OptionalTensor& y_mask, std::optional<double> scale,
                                                   std::optional<double> clamp, bool training) {
  Call call(x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp);
  for (Side* side : {&call.x, &call.y}) {
    const Tensor& q = side->query;
    side->out = empty_in_order_of(q, {q.size(0), q.size(1), q.size(2), x_value.size(3)});
    const auto options = q.options().dtype(at::kFloat);
    side->stats =
        training ? at::cpu::empty({3, q.size(0), q.size(1), q.size(2)}, options) : at::cpu::empty({0}, options);
  }
  const auto results = [&] { return std::tuple{call.x.out, call.y.out, call.x.stats, call.y.stats}; };
  if (call.has_no_scores()) {
    for (const Tensor& t : {call.x.out, call.y.out, call.x.stats, call.y.stats}) t.zero_();
    return results();
  }
  MMK_DISPATCH(bidirectional_forward)(call.params(1.));
  // What stands in padding must not reach other tokens, and 0 · NaN would: only then is it looked at.
  if (call.is_masked() && !(is_finite(call.x.out) && is_finite(call.y.out)) && call.clean_padding()) {
    MMK_DISPATCH(bidirectional_forward)(call.params(1.));
  }
  for (const Side* side : {&call.x, &call.y}) to_natural(side->stats_data(), side->stats.numel() / 3);
  return results();
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& x_query, const Tensor& y_key, const Tensor& x_value,
                             const Tensor& y_value, const OptionalTensor& x_mask, const OptionalTensor& y_mask,
                             std::optional<double> scale, std::optional<double> clamp, at::TensorList saved,
                             c10::List<bool> needed) {
  Call call(x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp);
  Side &x = call.x, &y = call.y;
  x.grad_query = empty_gradient(needed[0], x_query);
  y.grad_query = empty_gradient(needed[1], y_key);
  x.grad_value = empty_gradient(needed[2], x_value);
  y.grad_value = empty_gradient(needed[3], y_value);
  std::vector<Tensor> result{x.grad_query, y.grad_query, x.grad_value, y.grad_value};
  for (int mask = 0; mask < 2; ++mask) result.push_back(at::cpu::empty({0}, x_query.options()));
  if (call.has_no_scores()) {
    for (const Tensor& t : result) t.zero_();
    return result;
  }
  x.out = saved[0], y.out = saved[1];
  x.stats = saved[2].clone(at::MemoryFormat::Contiguous), y.stats = saved[3].clone(at::MemoryFormat::Contiguous);
  for (const Side* side : {&x, &y}) to_exponents(side->stats_data(), side->stats.numel() / 3);
  x.grad_out = grads[0], y.grad_out = grads[1];
  MMK_DISPATCH(bidirectional_backward)(call.params(2.5));
  if (call.is_masked() && !std::all_of(result.begin(), result.end(), is_finite) && call.clean_padding()) {
    MMK_DISPATCH(bidirectional_backward)(call.params(2.5));
    x.clear_padded_gradients();
    y.clear_padded_gradients();
  }
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  if (!arguments[4].isNone() || !arguments[5].isNone() || !arguments[7].isNone()) return false;  // rarely small calls
  const Tensor q = arguments[0].toTensor(), k = arguments[1].toTensor(), xv = arguments[2].toTensor(),
               yv = arguments[3].toTensor();
  const auto dtype = q.scalar_type();
  for (const Tensor* t : {&q, &k, &xv, &yv}) {
    if (t->scalar_type() != dtype || t->dim() != 4 || t->size(0) != q.size(0) || t->size(1) != q.size(1)) return false;
  }
  return k.size(3) == q.size(3) && xv.size(2) == q.size(2) && yv.size(2) == k.size(2) && xv.size(3) == yv.size(3) &&
         is_countable({q.size(0), q.size(1), q.size(2), k.size(2)});
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_bidirectional_cross_attention_fwd(Tensor x_query, Tensor y_key, Tensor x_value, Tensor y_value, "
      "Tensor? x_mask, Tensor? y_mask, float? scale, float? clamp, bool training) "
      "-> (Tensor x_out, Tensor y_out, Tensor x_stats, Tensor y_stats)");
  m.def(
      "_bidirectional_cross_attention_bwd(Tensor[] grads, Tensor x_query, Tensor y_key, Tensor x_value, "
      "Tensor y_value, Tensor? x_mask, Tensor? y_mask, float? scale, float? clamp, Tensor[] saved, bool[] needed) "
      "-> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_bidirectional_cross_attention_fwd", forward);
  m.impl("_bidirectional_cross_attention_bwd", backward);
}

}  // namespace
}  // namespace mmk::bidirectional_cross_attention

// cross_attention on the CPU, as torch sees it. Arguments were checked at the door (mmkernels/ops/cross_attention):
// here they become Params, and outputs are allocated. All tensors are [B, H, L, features], features contiguous.
#include "csrc/cross_attention/cross_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_workers.h"

namespace mmk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Options {
  int64_t window_left, window_right;
  bool bottom_right;
  double softcap, scale, dropout_p;
};

struct Inputs {
  Tensor query, key, value;
  OptionalTensor mask, bias, sinks, key_lengths, rng_state;
};

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kBool:
      return Dtype::boolean;
    default:
      TORCH_CHECK_TYPE(false, "cross_attention: expected float32, bfloat16 or float16; got ", t.scalar_type());
  }
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// Strides of a mask or of its gradient, 0 where it is broadcast.
template <class M>
void set_strides(M& m, const Tensor& t) {
  const auto stride = [&](int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  m.batch = stride(0);
  m.head = stride(1);
  m.query = stride(2);
  m.key = stride(3);
}

AttentionMask mask_of(const Tensor& t, bool* hides) {
  AttentionMask m;
  m.data = t.const_data_ptr();
  m.dtype = dtype_of(t);
  m.hides = hides;
  set_strides(m, t);
  return m;
}

// The shape that both are broadcast to.
std::vector<int64_t> joint_shape(const Tensor& a, const Tensor& b) {
  std::vector<int64_t> shape = a.sizes().vec();
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (a.size(dim) == 1) shape[static_cast<size_t>(dim)] = b.size(dim);
  }
  return shape;
}

AttentionParams make_params(const Inputs& in, const Options& o, double products, bool* mask_hides) {
  AttentionParams p;
  const Tensor &q = in.query, &k = in.key, &v = in.value;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.head_dim = q.size(3);
  p.value_dim = v.size(3);
  p.dtype = dtype_of(q);
  p.query_segments = p.key_segments = 1;
  p.queries[0].query = rows_of(q);
  p.queries[0].length = q.size(2);
  p.keys[0].key = rows_of(k);
  p.keys[0].value = rows_of(v);
  p.keys[0].length = k.size(2);
  if (in.key_lengths) p.keys[0].lengths = in.key_lengths->const_data_ptr<int64_t>();
  if (in.mask) p.mask = mask_of(*in.mask, mask_hides);
  if (in.bias) (in.mask ? p.second_mask : p.mask) = mask_of(*in.bias, mask_hides);
  if (in.sinks) p.sinks = in.sinks->const_data_ptr<float>();
  p.window_left = o.window_left;
  p.window_right = o.window_right;
  p.bottom_right = o.bottom_right;
  p.softcap = static_cast<float>(o.softcap);
  p.scale = static_cast<float>(o.scale);
  if (o.dropout_p > 0.) {
    p.dropout_p = static_cast<float>(o.dropout_p);
    const auto* state = in.rng_state->const_data_ptr<int64_t>();
    p.seed = static_cast<uint64_t>(state[0]);
    p.offset = static_cast<uint32_t>(state[1]);
  }
  p.workers = torch_workers(products * static_cast<double>(p.batch * p.heads) * static_cast<double>(q.size(2)) *
                            static_cast<double>(k.size(2)) * static_cast<double>(p.head_dim + p.value_dim));
  return p;
}

// Whether there is no score at all: no batch, head, query or key.
bool has_no_scores(const Inputs& in) {
  return in.query.size(0) == 0 || in.query.size(1) == 0 || in.query.size(2) == 0 || in.key.size(2) == 0;
}

// row_max [B, Hq, Lq] of rows without a key: that of their sinks, which need no log_sum.
void fill_with_sinks(const Inputs& in, const Tensor& out, const Tensor& row_max, const Tensor& log_sum) {
  const Tensor sinks = in.sinks->view({1, -1, 1});
  out.masked_fill_(sinks.isnan().unsqueeze(-1), std::numeric_limits<double>::quiet_NaN());
  if (row_max.dim() != 3) return;
  row_max.copy_(sinks.expand_as(row_max));
  log_sum.copy_(row_max.masked_fill(sinks.ne(-kInfinity), 0));
}

// Rows that may attend to no key, [B, Hq, Lq], where a sink hides that from row_max.
Tensor idle_rows(Inputs in, const Options& o) {
  in.sinks.reset();
  in.query = at::zeros_like(in.query);
  take_out_poison(in.key, in.value);
  const Tensor out =
      empty_in_order_of(in.query, {in.query.size(0), in.query.size(1), in.query.size(2), in.value.size(3)});
  const Tensor stats =
      at::empty({2, in.query.size(0), in.query.size(1), in.query.size(2)}, in.query.options().dtype(at::kFloat));
  bool mask_hides = false;
  AttentionParams p = make_params(in, o, 2., &mask_hides);
  p.dropout_p = 0.f;
  p.queries[0].out = rows_of(out);
  p.queries[0].row_max = stats[0].data_ptr<float>();
  p.queries[0].log_sum = stats[1].data_ptr<float>();
  MMK_DISPATCH(attention_forward)(p);
  return stats[0].eq(-kInfinity);
}

// Whether some score was hidden: by lengths, a window, or as the kernel found by an entry of the mask.
bool is_masked(const Inputs& in, const Options& o, bool mask_hides) {
  return mask_hides || in.key_lengths || o.window_left >= 0 || o.window_right >= 0;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, const OptionalTensor& bias,
    const OptionalTensor& sinks, const OptionalTensor& key_lengths, int64_t window_left, int64_t window_right,
    bool bottom_right, double softcap, double scale, double dropout_p, const OptionalTensor& rng_state, bool with_lse) {
  Inputs in{query, key, value, mask, bias, contiguous(sinks), dense_integers(key_lengths), dense_integers(rng_state)};
  const Options o{window_left, window_right, bottom_right, softcap, scale, dropout_p};
  const Tensor out = empty_in_order_of(query, {query.size(0), query.size(1), query.size(2), value.size(3)});
  const auto stats_options = query.options().dtype(at::kFloat);
  const std::vector<int64_t> stats_size = with_lse ? query.sizes().slice(0, 3).vec() : std::vector<int64_t>{0};
  const Tensor row_max = at::empty(stats_size, stats_options), log_sum = at::empty(stats_size, stats_options);
  if (has_no_scores(in)) {
    out.zero_();
    row_max.fill_(-kInfinity);
    log_sum.fill_(-kInfinity);
    if (sinks) fill_with_sinks(in, out, row_max, log_sum);
    return {out, row_max, log_sum};
  }
  bool mask_hides = false;
  const auto run = [&](const Tensor& poisoned) {
    AttentionParams p = make_params(in, o, 2., &mask_hides);
    p.queries[0].out = rows_of(out);
    if (with_lse) {
      p.queries[0].row_max = row_max.data_ptr<float>();
      p.queries[0].log_sum = log_sum.data_ptr<float>();
    }
    p.keys[0].poisoned = poison_data(poisoned);
    constexpr int64_t kFew = 4;
    const bool few = !with_lse && dropout_p == 0. && query.size(2) <= kFew;
    (few ? MMK_DISPATCH(attention_few_queries) : MMK_DISPATCH(attention_forward))(p);
  };
  run({});
  // What is masked must not reach the output, and 0 · NaN would: only then are K and V looked at.
  if (is_masked(in, o, mask_hides) && !is_finite(out)) {
    if (const Tensor poisoned = take_out_poison(in.key, in.value); poisoned.defined()) run(poisoned);
  }
  return {out, row_max, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_log_sum, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& sinks,
    const OptionalTensor& key_lengths, const Tensor& out, const Tensor& row_max, const Tensor& log_sum,
    int64_t window_left, int64_t window_right, bool bottom_right, double softcap, double scale, double dropout_p,
    const OptionalTensor& rng_state, std::array<bool, 6> grad_mask) {
  Inputs in{query, key, value, mask, bias, contiguous(sinks), dense_integers(key_lengths), dense_integers(rng_state)};
  const Options o{window_left, window_right, bottom_right, softcap, scale, dropout_p};
  const Tensor dq = empty_gradient(grad_mask[0], query), dk = empty_gradient(grad_mask[1], key),
               dv = empty_gradient(grad_mask[2], value);
  const Tensor row_max_dense = row_max.contiguous(), log_sum_dense = log_sum.contiguous();
  const Tensor grad_log_sum_dense = grad_log_sum ? grad_log_sum->contiguous() : Tensor{};
  const auto none = [&] { return at::empty({0}, query.options()); };
  Tensor grad = grad_out, dmask = none(), dsinks = grad_mask[5] ? at::empty_like(*in.sinks) : none();
  // The gradient of both masks is summed for what they are broadcast to.
  const bool of_masks = grad_mask[3] || grad_mask[4], of_both = grad_mask[3] && grad_mask[4];
  const std::vector<int64_t> dmask_shape = of_both        ? joint_shape(*mask, *bias)
                                           : grad_mask[3] ? mask->sizes().vec()
                                           : grad_mask[4] ? bias->sizes().vec()
                                                          : std::vector<int64_t>{};
  const bool sums_mask =  // in float32: broadcast entries, and those of two
      of_both ||
      (of_masks && dmask_shape != std::vector<int64_t>{query.size(0), query.size(1), query.size(2), key.size(2)});

  bool mask_hides = false;
  const auto run = [&](const Tensor& poisoned) {
    AttentionParams p = make_params(in, o, 5., &mask_hides);
    QuerySegment& q = p.queries[0];
    q.out = rows_of(out);
    q.grad_out = rows_of(grad);
    q.row_max = row_max_dense.data_ptr<float>();
    q.log_sum = log_sum_dense.data_ptr<float>();
    if (grad_log_sum) q.grad_log_sum = grad_log_sum_dense.const_data_ptr<float>();
    if (grad_mask[0]) q.grad_query = rows_of(dq);
    if (grad_mask[1]) p.keys[0].grad_key = rows_of(dk);
    if (grad_mask[2]) p.keys[0].grad_value = rows_of(dv);
    if (of_masks) {
      const auto options = (grad_mask[3] ? mask : bias)->options();
      // Blocks that a mask per key hides as a whole are left out.
      const bool leaves_out = (mask && bias) || query.size(2) == 1;
      p.grad_mask.zeroed = sums_mask || leaves_out || key_lengths || window_left >= 0 || window_right >= 0;
      dmask = at::empty(dmask_shape, sums_mask ? options.dtype(at::kFloat) : options);
      if (p.grad_mask.zeroed) dmask.zero_();
      p.grad_mask.data = dmask.data_ptr();
      p.grad_mask.dtype = dtype_of(dmask);
      set_strides(p.grad_mask, dmask);
    }
    if (grad_mask[5]) p.grad_sinks = dsinks.data_ptr<float>();
    p.keys[0].poisoned = poison_data(poisoned);
    MMK_DISPATCH(attention_backward)(p);
  };
  if (has_no_scores(in)) {
    for (const Tensor& t : {dq, dk, dv, dsinks}) t.zero_();
    if (grad_mask[5] && grad_log_sum) {  // each row's lse is its sink
      dsinks.copy_(grad_log_sum_dense.sum({0, 2}).masked_fill(in.sinks->eq(-kInfinity), 0));
    }
    const auto zeros = [&](bool wanted, const OptionalTensor& t) {
      return wanted ? at::zeros(t->sizes(), t->options()) : none();
    };
    return {dq, dk, dv, zeros(grad_mask[3], mask), zeros(grad_mask[4], bias), dsinks};
  }
  run({});
  const std::array results{dq, dk, dv, dmask, dsinks};
  if (is_masked(in, o, mask_hides) && !std::all_of(results.begin(), results.end(), is_finite)) {
    const Tensor empty = (sinks ? idle_rows(in, o) : row_max_dense.eq(-kInfinity)).unsqueeze(-1);
    in.query = query.masked_fill(empty, 0);
    grad = grad_out.masked_fill(empty, 0);
    run(take_out_poison(in.key, in.value));
  }
  const auto of = [&](bool wanted, const OptionalTensor& t) {
    if (!wanted) return none();
    const Tensor summed = dmask.sum_to_size(t->sizes()).to(t->scalar_type());
    return of_both && summed.is_alias_of(dmask) ? summed.clone() : summed;
  };
  return {dq, dk, dv, of(grad_mask[3], mask), of(grad_mask[4], bias), dsinks};
}

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_cross_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? attn_bias, Tensor? "
      "sinks, "
      "Tensor? key_lengths, int window_left, int window_right, bool bottom_right, float softcap, float scale, "
      "float dropout_p, Tensor? rng_state, bool with_lse) -> (Tensor out, Tensor row_max, Tensor log_sum)");
  m.def(
      "_cross_attention_bwd(Tensor grad_out, Tensor? grad_log_sum, Tensor query, Tensor key, Tensor value, "
      "Tensor? attn_mask, Tensor? attn_bias, Tensor? sinks, Tensor? key_lengths, Tensor out, Tensor row_max, "
      "Tensor log_sum, int window_left, int window_right, bool bottom_right, float softcap, float scale, "
      "float dropout_p, Tensor? rng_state, bool[6] grad_mask) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dbias, Tensor dsinks)");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_cross_attention_fwd", cross_attention_forward);
  m.impl("_cross_attention_bwd", cross_attention_backward);
}

}  // namespace mmk

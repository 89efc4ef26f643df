// cross_attention on the CPU, as torch sees it. Arguments were checked before (mmkernels/ops/cross_attention, or
// `fits`): here they become Params, and outputs are allocated. Query, key and value are [B, H, L, features]; masks
// broadcast.
#include "csrc/cross_attention/cross_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::cross_attention {
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

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
         const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& key_lengths,
         const OptionalTensor& rng_state)
      : query(dense_rows(query)),
        key(dense_rows(key)),
        value(dense_rows(value)),
        mask(four_dims(mask)),
        bias(four_dims(bias)),
        sinks(sinks ? OptionalTensor(sinks->contiguous()) : sinks),
        key_lengths(dense_integers(key_lengths)),
        rng_state(dense_integers(rng_state)) {}

  // A mask of two to four dims as one of four, whose last is dense or repeated.
  static OptionalTensor four_dims(const OptionalTensor& mask) {
    if (!mask) return mask;
    Tensor t = *mask;
    while (t.dim() < 4) t = t.unsqueeze(0);
    return t.size(3) > 1 && t.stride(3) > 1 ? t.contiguous() : t;
  }
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

// Stats of rows without a key: row_max is that of their sinks, which need no log_sum.
void fill_with_sinks(const Inputs& in, const Tensor& out, const Tensor& stats) {
  const Tensor sinks = in.sinks->view({1, -1, 1});
  out.masked_fill_(sinks.isnan().unsqueeze(-1), std::numeric_limits<double>::quiet_NaN());
  if (stats.dim() != 4) return;
  stats[0].copy_(sinks.expand_as(stats[0]));
  stats[1].copy_(stats[0].masked_fill(sinks.ne(-kInfinity), 0));
}

// row_max + log_sum of stats [2, B, Hq, Lq].
Tensor lse_of(const Tensor& stats) {
  const Tensor lse = at::cpu::empty(stats.sizes().slice(1), stats.options());
  const auto* row_max = stats.const_data_ptr<float>();
  std::transform(row_max, row_max + lse.numel(), row_max + lse.numel(), lse.data_ptr<float>(), std::plus<float>());
  return lse;
}

// Rows that may attend to no key, [B, Hq, Lq], where a sink hides that from row_max.
Tensor idle_rows(Inputs in, const Options& o) {
  in.sinks.reset();
  in.query = at::zeros_like(in.query);
  take_out_poison(in.key, in.value);
  const Tensor out =
      empty_in_order_of(in.query, {in.query.size(0), in.query.size(1), in.query.size(2), in.value.size(3)});
  const Tensor stats =
      at::cpu::empty({2, in.query.size(0), in.query.size(1), in.query.size(2)}, in.query.options().dtype(at::kFloat));
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

Options options_of(const Tensor& query, int64_t window_left, int64_t window_right, bool bottom_right, double softcap,
                   const std::optional<double>& scale, double dropout_p) {
  const auto features = static_cast<double>(std::max<int64_t>(query.size(3), 1));
  return {window_left, window_right, bottom_right, softcap, scale ? *scale : 1. / std::sqrt(features), dropout_p};
}

}  // namespace

CrossAttentionOutputs cross_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const OptionalTensor& mask, const OptionalTensor& bias,
                                              const OptionalTensor& sinks, const OptionalTensor& key_lengths,
                                              int64_t window_left, int64_t window_right, bool bottom_right,
                                              double softcap, std::optional<double> scale, double dropout_p,
                                              const OptionalTensor& rng_state, bool, bool return_lse, bool training) {
  Inputs in(query, key, value, mask, bias, sinks, key_lengths, rng_state);
  const Options o = options_of(query, window_left, window_right, bottom_right, softcap, scale, dropout_p);
  const bool with_stats = training || return_lse;
  const Tensor out = empty_in_order_of(query, {query.size(0), query.size(1), query.size(2), value.size(3)});
  const Tensor none = at::cpu::empty({0}, query.options().dtype(at::kFloat));
  const Tensor stats =
      with_stats ? at::cpu::empty({2, query.size(0), query.size(1), query.size(2)}, none.options()) : none;
  const auto outputs = [&]() -> CrossAttentionOutputs {
    return {out, return_lse ? std::vector<Tensor>{lse_of(stats)} : std::vector<Tensor>{}, training ? stats : none};
  };
  if (has_no_scores(in)) {
    out.zero_();
    stats.fill_(-kInfinity);
    if (sinks) fill_with_sinks(in, out, stats);
    return outputs();
  }
  bool mask_hides = false;
  const auto run = [&](const Tensor& poisoned) {
    AttentionParams p = make_params(in, o, 2., &mask_hides);
    p.queries[0].out = rows_of(out);
    if (with_stats) {
      p.queries[0].row_max = stats.data_ptr<float>();
      p.queries[0].log_sum = p.queries[0].row_max + stats.numel() / 2;
    }
    p.keys[0].poisoned = poison_data(poisoned);
    constexpr int64_t kFew = 4;
    const bool few = !with_stats && dropout_p == 0. && query.size(2) <= kFew;
    (few ? MMK_DISPATCH(attention_few_queries) : MMK_DISPATCH(attention_forward))(p);
  };
  run({});
  // What is masked must not reach the output, and 0 · NaN would: only then are K and V looked at.
  if (is_masked(in, o, mask_hides) && !is_finite(out)) {
    if (const Tensor poisoned = take_out_poison(in.key, in.value); poisoned.defined()) run(poisoned);
  }
  return outputs();
}

std::vector<Tensor> cross_attention_backward_into(const std::array<Tensor, 3>& gradients, at::TensorList grads,
                                                  const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const OptionalTensor& mask, const OptionalTensor& bias,
                                                  const OptionalTensor& sinks, const OptionalTensor& key_lengths,
                                                  int64_t window_left, int64_t window_right, bool bottom_right,
                                                  double softcap, std::optional<double> scale, double dropout_p,
                                                  const OptionalTensor& rng_state, bool, bool return_lse,
                                                  at::TensorList saved, const c10::List<bool>& needed) {
  Inputs in(query, key, value, mask, bias, sinks, key_lengths, rng_state);
  const Options o = options_of(query, window_left, window_right, bottom_right, softcap, scale, dropout_p);
  const bool of_mask = needed[3], of_bias = needed[4], of_sinks = needed[5];
  const Tensor &dq = gradients[0], &dk = gradients[1], &dv = gradients[2];
  const Tensor out = dense_rows(saved[0]), stats = saved[saved.size() - 1].contiguous();  // between them the LSE
  const Tensor grad_lse = return_lse ? grads[1].contiguous() : Tensor{};
  const auto none = [&] { return at::cpu::empty({0}, query.options()); };
  Tensor grad = dense_rows(grads[0]), dmask = none(), dsinks = of_sinks ? at::empty_like(*in.sinks) : none();
  // The gradient of both masks is summed for what they are broadcast to.
  const bool of_masks = of_mask || of_bias, of_both = of_mask && of_bias;
  const std::vector<int64_t> dmask_shape = of_both   ? joint_shape(*in.mask, *in.bias)
                                           : of_mask ? in.mask->sizes().vec()
                                           : of_bias ? in.bias->sizes().vec()
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
    q.row_max = stats.data_ptr<float>();
    q.log_sum = q.row_max + stats.numel() / 2;
    if (return_lse) q.grad_log_sum = grad_lse.const_data_ptr<float>();
    if (needed[0]) q.grad_query = rows_of(dq);
    if (needed[1]) p.keys[0].grad_key = rows_of(dk);
    if (needed[2]) p.keys[0].grad_value = rows_of(dv);
    if (of_masks) {
      const auto options = (of_mask ? mask : bias)->options();
      // Blocks that a mask per key hides as a whole are left out.
      const bool leaves_out = (mask && bias) || query.size(2) == 1;
      p.grad_mask.zeroed = sums_mask || leaves_out || key_lengths || window_left >= 0 || window_right >= 0;
      dmask = at::cpu::empty(dmask_shape, sums_mask ? options.dtype(at::kFloat) : options);
      if (p.grad_mask.zeroed) dmask.zero_();
      p.grad_mask.data = dmask.data_ptr();
      p.grad_mask.dtype = dtype_of(dmask);
      set_strides(p.grad_mask, dmask);
    }
    if (of_sinks) p.grad_sinks = dsinks.data_ptr<float>();
    p.keys[0].poisoned = poison_data(poisoned);
    MMK_DISPATCH(attention_backward)(p);
  };
  const auto result = [&](const Tensor& of_mask, const Tensor& of_bias) -> std::vector<Tensor> {
    return {dq, dk, dv, of_mask, of_bias, dsinks, none(), none()};  // the last are lengths and random state
  };
  if (has_no_scores(in)) {
    for (const Tensor& t : {dq, dk, dv, dsinks}) t.zero_();
    if (of_sinks && return_lse) {  // each row's lse is its sink
      dsinks.copy_(grad_lse.sum({0, 2}).masked_fill(in.sinks->eq(-kInfinity), 0));
    }
    const auto zeros = [&](bool wanted, const OptionalTensor& t) {
      return wanted ? at::zeros(t->sizes(), t->options()) : none();
    };
    return result(zeros(of_mask, mask), zeros(of_bias, bias));
  }
  run({});
  const std::array results{dq, dk, dv, dmask, dsinks};
  if (is_masked(in, o, mask_hides) && !std::all_of(results.begin(), results.end(), is_finite)) {
    const Tensor empty = (sinks ? idle_rows(in, o) : stats[0].eq(-kInfinity)).unsqueeze(-1);
    in.query = query.masked_fill(empty, 0);
    grad = grad.masked_fill(empty, 0);
    run(take_out_poison(in.key, in.value));
  }
  const auto of = [&](bool wanted, const OptionalTensor& given, const OptionalTensor& t) {
    if (!wanted) return none();
    const Tensor summed = dmask.sum_to_size(t->sizes()).to(t->scalar_type());
    return (of_both && summed.is_alias_of(dmask) ? summed.clone() : summed).view(given->sizes());
  };
  return result(of(of_mask, mask, in.mask), of(of_bias, bias, in.bias));
}

namespace {

std::vector<Tensor> backward(at::TensorList grads, const Tensor& query, const Tensor& key, const Tensor& value,
                             const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& sinks,
                             const OptionalTensor& key_lengths, int64_t window_left, int64_t window_right,
                             bool bottom_right, double softcap, std::optional<double> scale, double dropout_p,
                             const OptionalTensor& rng_state, bool enable_gqa, bool return_lse, at::TensorList saved,
                             const c10::List<bool>& needed) {
  const std::array gradients{empty_gradient(needed[0], query), empty_gradient(needed[1], key),
                             empty_gradient(needed[2], value)};
  return cross_attention_backward_into(gradients, grads, query, key, value, mask, bias, sinks, key_lengths, window_left,
                                       window_right, bottom_right, softcap, scale, dropout_p, rng_state, enable_gqa,
                                       return_lse, saved, needed);
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const Tensor &query = arguments[0].toTensor(), &key = arguments[1].toTensor(), &value = arguments[2].toTensor();
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4) return false;
  const auto dtype = query.scalar_type();
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  const bool may_group = arguments[14].toBool();
  const bool heads_fit = k[1] == q[1] || (may_group && k[1] > 0 && q[1] % k[1] == 0);
  if (key.scalar_type() != dtype || value.scalar_type() != dtype || k[0] != q[0] || v[0] != q[0] || !heads_fit ||
      v[1] != k[1] || k[3] != q[3] || v[2] != k[2] || q[3] == 0 || !is_countable({q[0], q[1], q[2], k[2]})) {
    return false;
  }
  const std::array full{q[0], q[1], q[2], k[2]};
  const auto broadcasts = [&](const c10::IValue& argument, bool may_be_flags) {
    if (argument.isNone()) return true;
    const Tensor& mask = argument.toTensor();
    if (mask.dim() < 2 || mask.dim() > 4) return false;
    for (int64_t back = 1; back <= mask.dim(); ++back) {
      if (mask.size(-back) != 1 && mask.size(-back) != full[static_cast<size_t>(4 - back)]) return false;
    }
    return mask.scalar_type() == dtype || mask.scalar_type() == at::kFloat ||
           (may_be_flags && mask.scalar_type() == at::kBool);
  };
  if (!broadcasts(arguments[3], true) || !broadcasts(arguments[4], false)) return false;
  if (!arguments[5].isNone()) {
    const Tensor& sinks = arguments[5].toTensor();
    if (sinks.dim() != 1 || sinks.size(0) != q[1] || sinks.scalar_type() != at::kFloat) return false;
  }
  if (!arguments[6].isNone()) {
    const Tensor& lengths = arguments[6].toTensor();
    if (lengths.dim() != 1 || lengths.size(0) != q[0] || lengths.scalar_type() != at::kLong) return false;
    const auto* length = lengths.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < q[0]; ++b, length += lengths.stride(0)) {
      if (*length < 0 || *length > k[2]) return false;
    }
  }
  constexpr int64_t kLongest = int64_t{1} << 62;  // LONGEST of mmkernels/ops/_attention_checks.py
  for (const size_t side : {7, 8}) {
    if (arguments[side].toInt() < -1 || arguments[side].toInt() >= kLongest) return false;
  }
  const double softcap = arguments[10].toDouble();
  return softcap >= 0. && softcap < std::numeric_limits<double>::infinity() && arguments[12].toDouble() == 0.;
}

const DoorCheck door_check("cross_attention", fits, DoorCheck::Dtypes::any);  // those of masks may differ

}  // namespace

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_cross_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? attn_bias, "
      "Tensor? sinks, Tensor? key_lengths, int window_left, int window_right, bool bottom_right, float softcap, "
      "float? scale, float dropout_p, Tensor? rng_state, bool enable_gqa, bool return_lse, bool training) "
      "-> (Tensor out, Tensor[] lse, Tensor stats)");
  m.def(
      "_cross_attention_bwd(Tensor[] grads, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? attn_bias, Tensor? sinks, Tensor? key_lengths, int window_left, int window_right, bool bottom_right, "
      "float softcap, float? scale, float dropout_p, Tensor? rng_state, bool enable_gqa, bool return_lse, "
      "Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_cross_attention_fwd", cross_attention_forward);
  m.impl("_cross_attention_bwd", backward);
}

}  // namespace mmk::cross_attention

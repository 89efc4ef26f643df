// varlen_cross_attention on the CPU, as torch sees it: one call of the attention core on a packed batch. Arguments were
// checked at the door (mmkernels/ops/varlen_cross_attention): query [Tq, Hq, D], key [Tk, Hkv, D], value [Tk, Hkv, Dv],
// where a member of the batch starts [B + 1]; what those hold is checked here.
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::varlen_cross_attention {
namespace {

using at::Tensor;
constexpr const char* kName = "varlen_cross_attention";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Where the members of a packed batch start, and how long they are.
struct Members {
  Tensor starts;  // [B + 1] int64
  int64_t count, longest = 0, shortest = std::numeric_limits<int64_t>::max();
  bool valid;

  Members(const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen)
      : starts(dense_integers(cu_seqlens)), count(starts.numel() - 1) {
    const int64_t* const at = data();
    valid = count >= 0 && at[0] == 0 && at[count] == total;
    for (int64_t b = 0; b < count; ++b) {
      longest = std::max(longest, at[b + 1] - at[b]);
      shortest = std::min(shortest, at[b + 1] - at[b]);
    }
    valid = valid && (count == 0 || shortest >= 0) && longest <= max_seqlen;
  }
  const int64_t* data() const { return starts.const_data_ptr<int64_t>(); }
};

// [T, H, D] as [1, H, T, D].
Tensor heads_first(const Tensor& t) { return t.transpose(0, 1).unsqueeze(0); }

Rows packed_rows(const Tensor& heads_first, const Members& members) {
  Rows rows = rows_of(heads_first);
  rows.starts = members.data();
  return rows;
}

struct Inputs {
  Tensor query, key, value;  // [1, H, T, D]
  Members queries, keys;
  int64_t window_left, window_right;
  bool bottom_right;
  double scale, softcap;
  std::optional<Tensor> sinks;  // [Hq] float32

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
         const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
         int64_t window_right, bool bottom_right, std::optional<double> scale, double softcap,
         const std::optional<Tensor>& sinks)
      : query(heads_first(query)),
        key(heads_first(key)),
        value(heads_first(value)),
        queries(cu_seqlens_q, query.size(0), max_seqlen_q),
        keys(cu_seqlens_k, key.size(0), max_seqlen_k),
        window_left(window_left),
        window_right(window_right),
        bottom_right(bottom_right),
        softcap(softcap),
        sinks(sinks ? std::optional(sinks->contiguous()) : sinks) {
    for (const auto& [members, name, total, longest] :
         {std::tuple(&queries, "q", query.size(0), max_seqlen_q), std::tuple(&keys, "k", key.size(0), max_seqlen_k)}) {
      TORCH_CHECK_VALUE(members->valid, kName, ": cu_seqlens_", name, ": expected starts from 0 to ", total,
                        " in order, at most ", longest, " apart; got other values");
    }
    const int64_t features = query.size(2);
    this->scale = scale.value_or(features == 0 ? 1. : 1. / std::sqrt(static_cast<double>(features)));
  }

  bool has_no_scores() const { return query.size(1) == 0 || query.size(2) == 0 || key.size(2) == 0; }
  bool is_masked() const { return window_left >= 0 || window_right >= 0; }

  AttentionParams params(double products, const Tensor& poisoned) const {
    AttentionParams p;
    p.batch = queries.count;
    p.heads = query.size(1);
    p.kv_heads = key.size(1);
    p.head_dim = query.size(3);
    p.value_dim = value.size(3);
    p.dtype = floating_dtype_of(kName, query);
    p.query_segments = p.key_segments = 1;
    p.queries[0].query = packed_rows(query, queries);
    p.queries[0].length = queries.longest;
    p.queries[0].starts = queries.data();
    p.keys[0].key = packed_rows(key, keys);
    p.keys[0].value = packed_rows(value, keys);
    p.keys[0].length = keys.longest;
    p.keys[0].starts = keys.data();
    p.keys[0].poisoned = poison_data(poisoned);
    p.window_left = window_left;
    p.window_right = window_right;
    p.bottom_right = bottom_right;
    p.scale = static_cast<float>(scale);
    p.softcap = static_cast<float>(softcap);
    if (sinks) p.sinks = sinks->const_data_ptr<float>();
    double scores = 0.;
    for (int64_t b = 0; b < p.batch; ++b) {
      scores += static_cast<double>(length_of(queries, b)) * static_cast<double>(length_of(keys, b));
    }
    p.workers = torch_workers(products * static_cast<double>(p.heads * (p.head_dim + p.value_dim)) * scores);
    return p;
  }

 private:
  static int64_t length_of(const Members& members, int64_t b) { return members.data()[b + 1] - members.data()[b]; }
};

// row_max and log_sum, [2, Hq, Tq].
void set_stats(AttentionParams& p, const Tensor& stats) {
  p.queries[0].row_max = stats.data_ptr<float>();
  p.queries[0].log_sum = p.queries[0].row_max + stats.numel() / 2;
}

// Rows that may attend to no key, [Hq, Tq], where a sink hides that from row_max.
Tensor idle_rows(Inputs in) {
  in.sinks.reset();
  in.query = at::zeros_like(in.query);
  take_out_poison(in.key, in.value);
  const Tensor out = at::cpu::empty({1, in.query.size(1), in.query.size(2), in.value.size(3)}, in.query.options());
  const Tensor stats = at::cpu::empty({2, in.query.size(1), in.query.size(2)}, in.query.options().dtype(at::kFloat));
  AttentionParams p = in.params(2., {});
  p.queries[0].out = packed_rows(out, in.queries);
  set_stats(p, stats);
  MMK_DISPATCH(attention_forward)(p);
  return stats[0].eq(-kInfinity);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                           int64_t max_seqlen_k, int64_t window_left, int64_t window_right,
                                           bool bottom_right, std::optional<double> scale, double softcap,
                                           const std::optional<Tensor>& sinks, bool return_lse, bool training) {
  Inputs in(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right,
            bottom_right, scale, softcap, sinks);
  const Tensor out = empty_in_order_of(query, {query.size(0), query.size(1), value.size(2)});
  const bool with_stats = return_lse || training;
  const auto options = query.options().dtype(at::kFloat);
  const auto none = [&] { return at::cpu::empty({0}, options); };
  const Tensor stats = with_stats ? at::cpu::empty({2, query.size(1), query.size(0)}, options) : none();
  const auto results = [&] {
    const Tensor lse = return_lse ? at::add(stats[0], stats[1]).t().contiguous() : none();
    return std::tuple{out, lse, training ? stats : none()};
  };
  if (in.has_no_scores()) {
    out.zero_();
    stats.fill_(-kInfinity);
    if (sinks) {                                      // of rows without a key
      const Tensor column = in.sinks->view({-1, 1});  // [Hq, 1]
      out.masked_fill_(column.isnan(), std::numeric_limits<double>::quiet_NaN());
      if (with_stats) {
        stats[0].copy_(column.expand_as(stats[0]));
        stats[1].masked_fill_(column.ne(-kInfinity), 0);
      }
    }
    return results();
  }
  const auto run = [&](const Tensor& poisoned) {
    AttentionParams p = in.params(2., poisoned);
    p.queries[0].out = packed_rows(heads_first(out), in.queries);
    if (with_stats) set_stats(p, stats);
    constexpr int64_t kFew = 4;
    const bool few = !with_stats && in.queries.longest <= kFew && in.queries.shortest == in.queries.longest;
    (few ? MMK_DISPATCH(attention_few_queries) : MMK_DISPATCH(attention_forward))(p);
  };
  run({});
  // What is masked must not reach the output, and 0 · NaN would: only then are K and V looked at.
  if (in.is_masked() && !is_finite(out)) {
    if (const Tensor poisoned = take_out_poison(in.key, in.value); poisoned.defined()) run(poisoned);
  }
  return results();
}

std::vector<Tensor> backward(at::TensorList grads, const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                             int64_t max_seqlen_k, int64_t window_left, int64_t window_right, bool bottom_right,
                             std::optional<double> scale, double softcap, const std::optional<Tensor>& sinks,
                             bool return_lse, at::TensorList saved, const c10::List<bool>& needed) {
  Inputs in(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left, window_right,
            bottom_right, scale, softcap, sinks);
  std::vector<Tensor> result;  // of cu_seqlens and sinks too
  for (const Tensor& leaf : {query, key, value, cu_seqlens_q, cu_seqlens_k}) {
    const bool wanted = needed[result.size()];
    result.push_back(wanted ? empty_in_order_of(leaf, leaf.sizes()) : at::cpu::empty({0}, query.options()));
  }
  const bool of_sinks = sinks && needed[5];
  result.push_back(of_sinks ? at::empty_like(*in.sinks) : at::cpu::empty({0}, query.options()));
  if (in.has_no_scores()) {
    for (const Tensor& t : result) t.zero_();
    if (of_sinks && return_lse) {  // each row's lse is its sink
      result[5].copy_(grads[1].sum(0).masked_fill(in.sinks->eq(-kInfinity), 0));
    }
    return result;
  }
  if (in.queries.shortest == 0) {  // nobody comes to the keys of such a member
    result[1].zero_();
    result[2].zero_();
  }
  Tensor grad_out = heads_first(grads[0]);
  const Tensor out = heads_first(saved[0]), stats = saved[2].contiguous();
  const Tensor grad_lse = return_lse ? grads[1].t().contiguous() : Tensor();
  const auto run = [&](const Tensor& poisoned) {
    AttentionParams p = in.params(5., poisoned);
    set_stats(p, stats);
    p.queries[0].out = packed_rows(out, in.queries);
    p.queries[0].grad_out = packed_rows(grad_out, in.queries);
    if (return_lse) p.queries[0].grad_log_sum = grad_lse.const_data_ptr<float>();
    if (needed[0]) p.queries[0].grad_query = packed_rows(heads_first(result[0]), in.queries);
    if (needed[1]) p.keys[0].grad_key = packed_rows(heads_first(result[1]), in.keys);
    if (needed[2]) p.keys[0].grad_value = packed_rows(heads_first(result[2]), in.keys);
    if (of_sinks) p.grad_sinks = result[5].data_ptr<float>();
    MMK_DISPATCH(attention_backward)(p);
  };
  run({});
  if (in.is_masked() && !std::all_of(result.begin(), result.end(), is_finite)) {
    const Tensor empty = (sinks ? idle_rows(in) : stats[0].eq(-kInfinity)).unsqueeze(-1);  // [Hq, Tq, 1]
    in.query = in.query.masked_fill(empty, 0);
    grad_out = grad_out.masked_fill(empty, 0);
    run(take_out_poison(in.key, in.value));
  }
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto tensor = [&](size_t i) { return arguments[i].toTensor(); };
  const Tensor query = tensor(0), key = tensor(1), value = tensor(2), starts_q = tensor(3), starts_k = tensor(4);
  for (const Tensor& t : {query, key, value}) {
    if (t.dim() != 3 || t.scalar_type() != query.scalar_type()) return false;
  }
  for (const Tensor& t : {starts_q, starts_k}) {
    if (t.dim() != 1 || t.numel() == 0 || (t.scalar_type() != at::kInt && t.scalar_type() != at::kLong)) return false;
  }
  const bool shapes = key.size(2) == query.size(2) && value.size(0) == key.size(0) && value.size(1) == key.size(1) &&
                      key.size(1) > 0 && query.size(1) % key.size(1) == 0 && starts_q.numel() == starts_k.numel() &&
                      is_countable({query.size(0), query.size(1), key.size(0)});
  const double softcap = arguments[11].toDouble();
  if (!arguments[12].isNone()) {  // a floating tensor is of query's dtype here
    const Tensor sinks = arguments[12].toTensor();
    if (sinks.scalar_type() != at::kFloat || sinks.dim() != 1 || sinks.size(0) != query.size(1)) return false;
  }
  return shapes && softcap >= 0. && softcap < std::numeric_limits<double>::infinity() && arguments[7].toInt() >= -1 &&
         arguments[8].toInt() >= -1 && Members(starts_q, query.size(0), arguments[5].toInt()).valid &&
         Members(starts_k, key.size(0), arguments[6].toInt()).valid;
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_varlen_cross_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, int window_left, int window_right, bool bottom_right, float? scale, "
      "float softcap, Tensor? sinks, bool return_lse, bool training) -> (Tensor out, Tensor lse, Tensor stats)");
  m.def(
      "_varlen_cross_attention_bwd(Tensor[] grads, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, int window_left, int window_right, bool bottom_right, "
      "float? scale, float softcap, Tensor? sinks, bool return_lse, Tensor[] saved, bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_varlen_cross_attention_fwd", forward);
  m.impl("_varlen_cross_attention_bwd", backward);
}

}  // namespace
}  // namespace mmk::varlen_cross_attention

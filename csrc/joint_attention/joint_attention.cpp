// joint_attention on the CPU, as torch sees it: one call of the attention core with a segment for every stream.
// Arguments were checked at the door (mmkernels/ops/joint_attention): queries [B, Hq, L_s, D], keys and values, of Hkv
// heads, of as many streams as one another, stream_bias [1 or H, Sq, Sk] as [Sq, Sk] or [H, Sq, Sk], key_lengths[i] [B]
// that of stream padded_streams[i], rng_state [2] there where dropout_p is not 0.
#include <ATen/ops/add.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "csrc/attention/torch_rows.h"
#include "csrc/cpu/torch_tensors.h"
#include "csrc/cpu/torch_workers.h"
#include "csrc/door.h"

namespace mmk::joint_attention {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kName = "joint_attention";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t total_length(at::TensorList streams) {
  int64_t total = 0;
  for (const Tensor& t : streams) total += t.size(2);
  return total;
}

struct Inputs {
  at::TensorList queries;
  std::vector<Tensor> keys, values;  // NaN in them may have to give way
  std::vector<Tensor> key_lengths;   // dense int64
  at::IntArrayRef padded_streams;
  Tensor bias;  // float32, contiguous; undefined if there is none
  double scale, softcap, dropout_p;
  OptionalTensor rng_state;  // dense

  Inputs(at::TensorList queries, at::TensorList keys, at::TensorList values, at::TensorList key_lengths,
         at::IntArrayRef padded_streams, const OptionalTensor& stream_bias, std::optional<double> scale, double softcap,
         double dropout_p, const OptionalTensor& rng_state)
      : queries(queries),
        keys(keys.vec()),
        values(values.vec()),
        padded_streams(padded_streams),
        bias(stream_bias ? stream_bias->to(at::kFloat).contiguous() : Tensor()),
        softcap(softcap),
        dropout_p(dropout_p),
        rng_state(dense_integers(rng_state)) {
    for (const Tensor& t : key_lengths) this->key_lengths.push_back(dense_integers(t));
    const int64_t features = queries[0].size(3);
    this->scale = scale.value_or(features == 0 ? 1. : 1. / std::sqrt(static_cast<double>(features)));
  }

  int64_t rows() const { return queries[0].size(0) * queries[0].size(1) * total_length(queries); }
  bool has_no_scores() const { return rows() == 0 || total_length(keys) == 0; }
  // Whether something is hidden from some query.
  bool is_masked() const {
    if (!key_lengths.empty()) return true;
    if (!bias.defined()) return false;
    const float* const entries = bias.const_data_ptr<float>();
    return std::find(entries, entries + bias.numel(), -kInfinity) != entries + bias.numel();
  }
  // Keys of which K or V holds NaN or infinity, by stream; zeros take their place. No stream if there are none.
  std::vector<Tensor> take_out_poison() {
    std::vector<Tensor> poisoned(keys.size());
    bool any = false;
    for (size_t s = 0; s < keys.size(); ++s) {
      poisoned[s] = mmk::take_out_poison(keys[s], values[s]);
      any |= poisoned[s].defined();
    }
    return any ? poisoned : std::vector<Tensor>{};
  }

  AttentionParams params(double products, const std::vector<Tensor>& poisoned) const {
    const Tensor& q = queries[0];
    AttentionParams p;
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.kv_heads = keys[0].size(1);
    p.head_dim = q.size(3);
    p.value_dim = values[0].size(3);
    p.dtype = floating_dtype_of(kName, q);
    p.query_segments = static_cast<int>(queries.size());
    p.key_segments = static_cast<int>(keys.size());
    for (size_t s = 0; s < queries.size(); ++s) {
      p.queries[s].query = rows_of(queries[s]);
      p.queries[s].length = queries[s].size(2);
    }
    for (size_t s = 0; s < keys.size(); ++s) {
      p.keys[s].key = rows_of(keys[s]);
      p.keys[s].value = rows_of(values[s]);
      p.keys[s].length = keys[s].size(2);
      if (!poisoned.empty()) p.keys[s].poisoned = poison_data(poisoned[s]);
    }
    for (size_t i = 0; i < key_lengths.size(); ++i) {
      p.keys[padded_streams[i]].lengths = key_lengths[i].const_data_ptr<int64_t>();
    }
    if (bias.defined()) {
      p.bias.data = bias.const_data_ptr<float>();
      if (bias.dim() == 3) p.bias.head = bias.stride(0);
    }
    p.scale = static_cast<float>(scale);
    p.softcap = static_cast<float>(softcap);
    if (dropout_p > 0.) {
      p.dropout_p = static_cast<float>(dropout_p);
      const auto* state = rng_state->const_data_ptr<int64_t>();
      p.seed = static_cast<uint64_t>(state[0]);
      p.offset = static_cast<uint32_t>(state[1]);
    }
    p.workers = torch_workers(products * static_cast<double>(rows()) * static_cast<double>(total_length(keys)) *
                              static_cast<double>(p.head_dim + p.value_dim));
    return p;
  }
};

// row_max of the query streams one after the other, then log_sum of them, all [B, H, L_s].
void set_stats(AttentionParams& p, const Tensor& stats) {
  float* at = stats.data_ptr<float>();
  const int64_t rows = stats.numel() / 2;
  for (int s = 0; s < p.query_segments; ++s) {
    p.queries[s].row_max = at;
    p.queries[s].log_sum = at + rows;
    at += p.batch * p.heads * p.queries[s].length;
  }
}

std::vector<Tensor> log_sum_exps(at::TensorList queries, const Tensor& stats) {
  std::vector<Tensor> lses;
  int64_t at = 0;
  for (const Tensor& q : queries) {
    const auto shape = q.sizes().slice(0, 3);
    const int64_t rows = c10::multiply_integers(shape);
    const auto part = [&](int64_t begin) { return stats.narrow(0, begin, rows).view(shape); };
    lses.push_back(at::add(part(at), part(stats.numel() / 2 + at)));
    at += rows;
  }
  return lses;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> forward(
    at::TensorList queries, at::TensorList keys, at::TensorList values, at::TensorList key_lengths,
    at::IntArrayRef padded_streams, const OptionalTensor& stream_bias, std::optional<double> scale, double softcap,
    double dropout_p, const OptionalTensor& rng_state, bool return_lse, bool training) {
  Inputs in(queries, keys, values, key_lengths, padded_streams, stream_bias, scale, softcap, dropout_p, rng_state);
  std::vector<Tensor> outs;
  for (const Tensor& q : queries) {
    outs.push_back(empty_in_order_of(q, {q.size(0), q.size(1), q.size(2), values[0].size(3)}));
  }
  const bool with_stats = return_lse || training;
  const Tensor stats = at::cpu::empty({with_stats ? 2 * in.rows() : 0}, queries[0].options().dtype(at::kFloat));
  const auto results = [&] {
    return std::tuple{outs, return_lse ? log_sum_exps(queries, stats) : std::vector<Tensor>{},
                      training ? stats : at::cpu::empty({0}, stats.options())};
  };
  if (in.has_no_scores()) {
    for (Tensor& out : outs) out.zero_();
    stats.fill_(-kInfinity);
    return results();
  }
  const auto run = [&](const std::vector<Tensor>& poisoned) {
    AttentionParams p = in.params(2., poisoned);
    for (size_t s = 0; s < outs.size(); ++s) p.queries[s].out = rows_of(outs[s]);
    if (with_stats) set_stats(p, stats);
    constexpr int64_t kFew = 4;
    const bool few = !with_stats && dropout_p == 0. && total_length(queries) <= kFew;
    (few ? MMK_DISPATCH(attention_few_queries) : MMK_DISPATCH(attention_forward))(p);
  };
  run({});
  // What is masked must not reach the output, and 0 · NaN would: only then are K and V looked at.
  if (in.is_masked() && !std::all_of(outs.begin(), outs.end(), is_finite)) {
    if (const auto poisoned = in.take_out_poison(); !poisoned.empty()) run(poisoned);
  }
  return results();
}

std::vector<Tensor> backward(at::TensorList grads, at::TensorList queries, at::TensorList keys, at::TensorList values,
                             at::TensorList key_lengths, at::IntArrayRef padded_streams,
                             const OptionalTensor& stream_bias, std::optional<double> scale, double softcap,
                             double dropout_p, const OptionalTensor& rng_state, bool return_lse, at::TensorList saved,
                             c10::List<bool> needed) {
  Inputs in(queries, keys, values, key_lengths, padded_streams, stream_bias, scale, softcap, dropout_p, rng_state);
  const size_t streams = queries.size(), sources = keys.size();
  const at::TensorList outs = saved.slice(0, streams);
  const Tensor stats = saved.back().contiguous();
  std::vector<Tensor> grad_outs = grads.slice(0, streams).vec(), grad_lses;
  if (return_lse) {
    for (const Tensor& g : grads.slice(streams)) grad_lses.push_back(g.contiguous());
  }
  std::vector<Tensor> result;
  for (const at::TensorList leaves : {queries, keys, values}) {
    for (const Tensor& leaf : leaves) result.push_back(empty_gradient(needed[result.size()], leaf));
  }
  for (size_t i = 0; i < key_lengths.size(); ++i) result.push_back(at::cpu::empty({0}, grads[0].options()));
  const bool wants_bias = needed[result.size()];
  Tensor grad_bias = at::cpu::empty({0}, grads[0].options());
  if (wants_bias) grad_bias = at::zeros(stream_bias->sizes(), in.bias.options());
  if (in.has_no_scores()) {
    for (const Tensor& t : result) t.zero_();
  } else {
    const auto run = [&](const std::vector<Tensor>& poisoned) {
      AttentionParams p = in.params(5., poisoned);
      set_stats(p, stats);
      const auto rows_if = [&](size_t i) { return needed[i] ? rows_of(result[i]) : Rows{}; };
      for (size_t s = 0; s < streams; ++s) {
        QuerySegment& q = p.queries[s];
        q.query = rows_of(in.queries[s]);
        q.out = rows_of(outs[s]);
        q.grad_out = rows_of(grad_outs[s]);
        if (return_lse) q.grad_log_sum = grad_lses[s].const_data_ptr<float>();
        q.grad_query = rows_if(s);
      }
      for (size_t s = 0; s < sources; ++s) {
        p.keys[s].grad_key = rows_if(streams + s);
        p.keys[s].grad_value = rows_if(streams + sources + s);
      }
      if (wants_bias) p.bias.grad = grad_bias.data_ptr<float>();
      MMK_DISPATCH(attention_backward)(p);
    };
    run({});
    if (in.is_masked() && !(std::all_of(result.begin(), result.end(), is_finite) && is_finite(grad_bias))) {
      // Neither does a query that attends to nothing reach a gradient.
      std::vector<Tensor> clean;
      int64_t at = 0;
      for (size_t s = 0; s < streams; ++s) {
        const auto shape = queries[s].sizes().slice(0, 3);
        const int64_t rows = c10::multiply_integers(shape);
        const Tensor empty = stats.narrow(0, at, rows).view(shape).eq(-kInfinity).unsqueeze(-1);
        clean.push_back(queries[s].masked_fill(empty, 0));
        grad_outs[s] = grad_outs[s].masked_fill(empty, 0);
        at += rows;
      }
      in.queries = clean;
      run(in.take_out_poison());
    }
  }
  result.push_back(wants_bias ? grad_bias.to(stream_bias->scalar_type()) : grad_bias);
  result.push_back(at::cpu::empty({0}, grads[0].options()));  // of rng_state
  return result;
}

bool fits(const std::vector<c10::IValue>& arguments) {
  const auto queries = arguments[0].toTensorList(), keys = arguments[1].toTensorList(),
             values = arguments[2].toTensorList();
  const size_t streams = queries.size(), sources = keys.size();
  if (streams == 0 || sources == 0 || values.size() != sources || streams > kMaxSegments || sources > kMaxSegments) {
    return false;
  }
  const Tensor first = queries.get(0);
  if (first.dim() != 4) return false;
  const auto dtype = first.scalar_type();
  const int64_t batch = first.size(0), heads = first.size(1), features = first.size(3);
  const auto is = [&](const Tensor& t) {
    return t.scalar_type() == dtype && t.dim() == 4 && t.size(0) == batch && t.size(1) == heads;
  };
  for (const Tensor& q : queries) {
    if (!is(q) || q.size(3) != features) return false;
  }
  for (size_t s = 0; s < sources; ++s) {
    const Tensor k = keys.get(s), v = values.get(s);
    if (!is(k) || k.size(3) != features || !is(v) || v.size(2) != k.size(2)) return false;
    if (v.size(3) != values.get(0).size(3)) return false;
  }
  if (!arguments[3].toTensorList().empty()) return false;  // whose values want a look
  if (!arguments[5].isNone()) {
    const Tensor bias = arguments[5].toTensor();
    const int64_t dims = bias.dim();
    if (bias.scalar_type() != dtype || (dims != 2 && dims != 3) || (dims == 3 && bias.size(0) != heads)) return false;
    if (bias.size(dims - 2) != static_cast<int64_t>(streams) || bias.size(dims - 1) != static_cast<int64_t>(sources)) {
      return false;
    }
  }
  if (arguments[8].toDouble() != 0.) return false;
  int64_t rows = 0, columns = 0;
  for (const Tensor& q : queries) rows += q.size(2);
  for (const Tensor& k : keys) columns += k.size(2);
  const double softcap = arguments[7].toDouble();
  return is_countable({batch, heads, rows, columns}) && softcap >= 0. &&
         softcap < std::numeric_limits<double>::infinity();
}

const DoorCheck door_check(kName, fits);

TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(
      "_joint_attention_fwd(Tensor[] queries, Tensor[] keys, Tensor[] values, Tensor[] key_lengths, "
      "int[] padded_streams, Tensor? stream_bias, float? scale, float softcap, float dropout_p, Tensor? rng_state, "
      "bool return_lse, bool training) "
      "-> (Tensor[] outs, Tensor[] lses, Tensor stats)");
  m.def(
      "_joint_attention_bwd(Tensor[] grads, Tensor[] queries, Tensor[] keys, Tensor[] values, Tensor[] key_lengths, "
      "int[] padded_streams, Tensor? stream_bias, float? scale, float softcap, float dropout_p, Tensor? rng_state, "
      "bool return_lse, Tensor[] saved, "
      "bool[] needed) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("_joint_attention_fwd", forward);
  m.impl("_joint_attention_bwd", backward);
}

}  // namespace
}  // namespace mmk::joint_attention

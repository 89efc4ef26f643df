// The kernels by themselves, for builds with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer,
// which Python cannot load: `sanitized <seed>` runs each on random numbers and says how many results are not finite.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "csrc/attention/short_key_forward_cuda.cuh"
#include "csrc/attention/short_key_gradients_cuda.cuh"
#include "csrc/attention/short_key_query_gradient_cuda.cuh"
#include "csrc/concat_linear/concat_linear_cuda.cuh"
#include "csrc/concat_tokens/concat_tokens_cuda.cuh"
#include "csrc/merge_embeddings/merge_embeddings_cuda.cuh"
#include "csrc/modulated_norm/modulated_norm_cuda.cuh"

using namespace mmk::cuda;

namespace {

std::mt19937 generator(1);

template <typename T>
std::vector<T> normal(size_t count) {
  std::normal_distribution<float> distribution;
  std::vector<T> values(count);
  for (T& x : values) x = from_float<T>(distribution(generator));
  return values;
}

template <typename T>
std::vector<T> unwritten(size_t count) {
  return std::vector<T>(count, from_float<T>(NAN));
}

std::vector<float> unwritten_floats(size_t count) { return std::vector<float>(count, NAN); }

int failures = 0;

void expect_finite(const char* what, const std::vector<float>& values) {
  size_t count = 0;
  for (float x : values) count += !std::isfinite(x);
  if (count == 0) return;
  std::printf("%s: %zu of %zu are not finite\n", what, count, values.size());
  ++failures;
}

template <typename T>
void expect_finite(const char* what, const std::vector<T>& values) {
  std::vector<float> floats(values.size());
  for (size_t i = 0; i < values.size(); ++i) floats[i] = to_float(values[i]);
  expect_finite(what, floats);
}

/// [B, H, L, D], dense.
template <typename T>
Rows dense(const std::vector<T>& x, int heads, int length, int dim) {
  return {x.data(), {int64_t(heads) * length * dim, int64_t(length) * dim, dim}};
}

template <typename T, int D>
void attention(int dim, std::vector<int> lengths, int queries, bool exact) {
  const int batch = 1, heads = 2, kv_heads = 1;
  ShortKeys p{};
  std::vector<std::vector<T>> keys, values, dkeys, dvalues;
  p.segment_count = int(lengths.size());
  for (int j = 0; j < p.segment_count; ++j) {
    keys.push_back(normal<T>(size_t(batch * kv_heads * lengths[j] * dim)));
    values.push_back(normal<T>(keys.back().size()));
    dkeys.push_back(unwritten<T>(keys.back().size()));
    dvalues.push_back(unwritten<T>(keys.back().size()));
    Segment& s = p.segments[j];
    const Rows k = dense(keys.back(), kv_heads, lengths[j], dim), v = dense(values.back(), kv_heads, lengths[j], dim);
    s.key = k.at;
    s.value = v.at;
    for (int i = 0; i < 3; ++i) s.key_strides[i] = k.strides[i], s.value_strides[i] = v.strides[i];
    s.length = lengths[j];
    s.first = p.total;
    p.total += lengths[j];
  }
  const std::vector<T> query = normal<T>(size_t(batch * heads * queries * dim)), grad_out = normal<T>(query.size());
  std::vector<T> out = unwritten<T>(query.size()), dquery = unwritten<T>(query.size());
  const std::vector<float> bias(size_t(heads * p.segment_count), 0.5f);
  p.query = dense(query, heads, queries, dim);
  p.keys = (p.total + kStep - 1) / kStep * kStep;
  p.batch = batch;
  p.heads = heads;
  p.group = heads / kv_heads;
  p.queries = queries;
  p.dim = dim;
  p.scale = 0.1f;
  p.bias = bias.data();
  p.tiles = 2;
  std::vector<float> row_max = unwritten_floats(size_t(batch * heads * queries)), log_sum = row_max, deltas = row_max;
  launch_short_key_forward<T, D>(p, {dense(out, heads, queries, dim), row_max.data(), log_sum.data()}, nullptr);
  expect_finite("out", out);
  const ShortKeyGradient d{dense(grad_out, heads, queries, dim),
                           dense(out, heads, queries, dim),
                           row_max.data(),
                           log_sum.data(),
                           nullptr,
                           deltas.data(),
                           exact};
  launch_short_key_query_gradient<T, D>(p, d, dense(dquery, heads, queries, dim), nullptr, nullptr);
  expect_finite("dQ", dquery);
  const int shares = (queries + p.tiles * kTileRows - 1) / (p.tiles * kTileRows);
  std::vector<float> dkey = unwritten_floats(size_t(shares * batch * heads * p.keys * dim)), dvalue = dkey;
  std::vector<float> dadded = unwritten_floats(size_t(shares * batch * heads * p.keys));
  launch_short_key_gradients<T, D>(p, d, {dkey.data(), dvalue.data(), dadded.data(), 0}, nullptr);
  for (int j = 0; j < p.segment_count; ++j)
    for (auto [sums, totals] : {std::pair{&dkey, &dkeys[j]}, std::pair{&dvalue, &dvalues[j]}}) {
      const ShortKeyTotal t{sums->data(), dense(*totals, kv_heads, lengths[j], dim),
                            shares,       batch,
                            heads,        p.group,
                            p.keys,       p.segments[j].first,
                            lengths[j],   dim,
                            1.0f};
      launch_short_key_total<T>(t, nullptr);
      expect_finite("dK or dV", *totals);
    }
}

template <typename T>
void modulated_norm(int length, int features, int run) {
  const int batch = 2;
  const int64_t stride = int64_t(length) * features;
  const std::vector<T> x = normal<T>(size_t(batch * stride)), g = normal<T>(x.size());
  const std::vector<T> shift = normal<T>(size_t(batch * features)), scale = normal<T>(shift.size());
  const std::vector<T> weight = normal<T>(size_t(features)), bias = normal<T>(weight.size());
  const ModulatedNorm p{x.data(), shift.data(), scale.data(), weight.data(), bias.data(), batch, length,
                        features, run,          stride,       features,      features,    0,     features,
                        0,        1e-5f,        Norm::kLayer, false};
  std::vector<T> y = unwritten<T>(x.size()), dx = y;
  launch_modulated_norm_forward<T>(p, y.data(), nullptr);
  expect_finite("y", y);
  const int runs = (length + run - 1) / run;
  std::vector<float> dshift = unwritten_floats(size_t(batch * runs * features)), dscale = dshift, dw = dshift,
                     db = dshift;
  const ModulatedNormGradients d{g.data(),      stride,        features,  dx.data(),
                                 dshift.data(), dscale.data(), dw.data(), db.data()};
  launch_modulated_norm_backward<T>(p, d, nullptr);
  expect_finite("dx", dx);
  for (const auto* sums : {&dshift, &dscale, &dw, &db}) expect_finite("sums over tokens", *sums);
}

/// concat_linear of three sources, each row with some of them, and the gradients of the second.
template <typename T>
void concat_linear(int rows, int features) {
  const int widths[] = {40, 8, 72}, count = 3, total = 120;
  std::vector<std::vector<T>> xs;
  for (int width : widths) xs.push_back(normal<T>(size_t(rows * width)));
  const std::vector<T> weight = normal<T>(size_t(features * total)), bias = normal<T>(size_t(features));
  std::vector<uint8_t> flags(size_t(rows * count));
  for (size_t i = 0; i < flags.size(); ++i) flags[i] = i % 5 != 2;
  ConcatLinear p{};
  for (int i = 0; i < count; ++i) {
    p.sources.x[i] = xs[i].data();
    p.sources.stride[i] = p.sources.width[i] = widths[i];
  }
  p.sources.count = count;
  p.sources.rows = rows;
  p.presence = {flags.data(), count, 1};
  p.weight = weight.data();
  p.weight_stride = total;
  std::vector<T> y = unwritten<T>(size_t(rows * features));
  p.epilogue.bias = bias.data();
  p.epilogue.y = y.data();
  p.epilogue.rows = rows;
  p.epilogue.features = features;
  launch_concat_linear_forward<T, 64>(p, nullptr);
  expect_finite("concat_linear", y);
  const Presence second{flags.data() + 1, count, 1};
  std::vector<T> dx = unwritten<T>(xs[1].size()), dweight = unwritten<T>(size_t(features * widths[1]));
  launch_input_gradient<T, 64>(
      {y.data(), weight.data() + widths[0], features, total, second, dx.data(), rows, features, widths[1]}, nullptr);
  expect_finite("dx", dx);
  launch_weight_gradient<T, 64>({y.data(), xs[1].data(), features, widths[1], second, dweight.data(), widths[1], rows,
                                 features, widths[1], rows, 1},
                                nullptr);
  expect_finite("dW", dweight);
}

template <typename T>
void concat_tokens(int features) {
  const int batch = 3, lengths[] = {5, 2}, total = 7;
  std::vector<std::vector<T>> xs, dxs;
  const std::vector<T> types = normal<T>(size_t(2 * features)), g = normal<T>(size_t(batch * total * features));
  std::vector<T> out = unwritten<T>(g.size());
  ConcatTokens p{};
  p.count = 2;
  p.batch = batch;
  p.total = total;
  p.features = features;
  p.run = 2;
  p.share = 2;
  p.eps = 1e-5f;
  p.norm = Norm::kLayer;
  p.type = types.data();
  p.type_source = features;
  for (int i = 0, start = 0; i < 2; start += lengths[i++]) {
    xs.push_back(normal<T>(size_t(batch * lengths[i] * features)));
    dxs.push_back(unwritten<T>(xs.back().size()));
    ConcatTokensSource& s = p.sources[i];
    s.x = xs.back().data();
    s.dx = dxs.back().data();
    s.x_batch = int64_t(lengths[i]) * features;
    s.x_token = features;
    s.length = lengths[i];
    s.start = start;
    s.first_team = p.teams;
    p.teams += (lengths[i] + p.run - 1) / p.run;
  }
  constexpr auto kDtype = kConcatTokensDtypeOf<T>;
  launch_concat_tokens_forward<T>(p, out.data(), kDtype, nullptr);
  expect_finite("concat_tokens", out);
  std::vector<float> dtypes = unwritten_floats(size_t(2 * p.teams * features));
  const ConcatTokensGradients d{g.data(), int64_t(total) * features, features, kDtype, kDtype, dtypes.data(), nullptr,
                                nullptr};
  launch_concat_tokens_backward<T>(p, d, nullptr);
  for (const auto& dx : dxs) expect_finite("dx", dx);
  expect_finite("sums of types", dtypes);
}

void merge_embeddings(int tokens, int features) {
  std::vector<uint8_t> mask(size_t(tokens), 0);
  int taken = 0;
  for (int i = 0; i < tokens; ++i) taken += mask[i] = i % 3 == 1;
  std::vector<Bf16> text = normal<Bf16>(size_t(tokens * features)), rows = normal<Bf16>(size_t((taken + 2) * features));
  std::vector<Bf16> out = unwritten<Bf16>(text.size()), drows = unwritten<Bf16>(rows.size());
  std::vector<int> counts(size_t((tokens + kMergeChunk - 1) / kMergeChunk));
  MergeEmbeddings p{};
  p.modals[0] = {&rows[0].bits, features, taken + 2};
  p.mask = mask.data();
  p.counts = counts.data();
  p.in = &text[0].bits;
  p.in_token = features;
  p.out = &out[0].bits;
  p.count = 1;
  p.tokens = p.length = tokens;
  p.vectors = features / kVector;
  p.even = true;
  launch_merge_embeddings_forward(p, nullptr);
  expect_finite("merge_embeddings", out);
  p.modals[0].rows = &drows[0].bits;
  launch_merge_embeddings_backward(p, nullptr);
  expect_finite("rows' gradients", drows);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  simt::world().seed = std::stoull(arguments[1]);
  attention<Bf16, 64>(64, {77}, 150, false);
  attention<Fp16, 32>(24, {9, 33, 70}, 70, true);
  modulated_norm<Bf16>(5, 264, 2);
  modulated_norm<Fp16>(3, 1040, 1);
  concat_linear<Bf16>(70, 72);
  concat_linear<Fp16>(20, 136);
  concat_tokens<Bf16>(264);
  concat_tokens<Fp16>(40);
  merge_embeddings(1100, 16);
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Kernels of the instruction sets of aarch64 against those of baseline, on the same inputs and without torch:
// tools/matrix.py compiles them by a cross compiler and runs this under qemu-user. Prints the largest error of each,
// and exits with 1 where one is beyond a few roundings of its dtype.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "csrc/attention/attention.h"
#include "csrc/concat_linear/concat_linear.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/runnable.h"
#include "csrc/merge_attention/merge_attention.h"
#include "csrc/modulated_norm/modulated_norm.h"

namespace {

using mmk::Dtype;

const mmk::Workers kAlone{1, [](int count, void (*body)(void*, int), void* context) {
                            for (int worker = 0; worker < count; ++worker) body(context, worker);
                          }};

uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float of_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Values of one dtype, NaN before something is written to them.
struct Values {
  Dtype dtype;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Values(Dtype of, size_t count) : dtype(of) {
    if (dtype == Dtype::f32) {
      floats.assign(count, std::nanf(""));
    } else {
      halves.assign(count, 0xffff);
    }
  }
  void* data() { return dtype == Dtype::f32 ? static_cast<void*>(floats.data()) : halves.data(); }
  size_t count() const { return dtype == Dtype::f32 ? floats.size() : halves.size(); }
  float at(size_t i) const {
    if (dtype == Dtype::f32) return floats[i];
    if (dtype == Dtype::bf16) return of_bf16(halves[i]);
    __fp16 x;
    std::memcpy(&x, &halves[i], sizeof x);
    return static_cast<float>(x);
  }
};

std::mt19937 generator(1);

Values random_values(Dtype dtype, size_t count, float gain = 1.f) {
  std::normal_distribution<float> normal;
  Values values(dtype, count);
  for (size_t i = 0; i < count; ++i) {
    const float x = gain * normal(generator);
    if (dtype == Dtype::f32) {
      values.floats[i] = x;
    } else if (dtype == Dtype::bf16) {
      values.halves[i] = bf16_of(x);
    } else {
      const __fp16 half = static_cast<__fp16>(x);
      std::memcpy(&values.halves[i], &half, sizeof half);
    }
  }
  return values;
}

using Results = std::vector<Values>;

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*merge_forward)(const mmk::MergeAttentionParams&);
  void (*merge_backward)(const mmk::MergeAttentionParams&);
  void (*norm_forward)(const mmk::ModulatedNormParams&);
  void (*norm_backward)(const mmk::ModulatedNormParams&);
  void (*linear_forward)(const mmk::ConcatLinearParams&);
  void (*linear_backward)(const mmk::ConcatLinearParams&);
  void (*attention_forward)(const mmk::AttentionParams&);
  void (*attention_backward)(const mmk::AttentionParams&);
};

#define MMK_KERNELS(isa)                                                                                           \
  Kernels {                                                                                                        \
    #isa, mmk::isa::merge_attention_forward, mmk::isa::merge_attention_backward, mmk::isa::modulated_norm_forward, \
        mmk::isa::modulated_norm_backward, mmk::isa::concat_linear_forward, mmk::isa::concat_linear_backward,      \
        mmk::isa::attention_forward, mmk::isa::attention_backward                                                  \
  }

Results merge(const Kernels& k, Dtype dtype, int size) {
  generator.seed(size);
  const size_t rows = 3 * size, features = 5 + size;
  std::vector<Values> outs, lses;
  Results results;
  for (int i = 0; i < 3; ++i) {
    outs.push_back(random_values(dtype, rows * features));
    lses.push_back(random_values(Dtype::f32, rows));
  }
  Values grad_out = random_values(dtype, rows * features), grad_lse = random_values(Dtype::f32, rows);
  results.emplace_back(dtype, rows * features);
  results.emplace_back(Dtype::f32, rows);
  std::vector<mmk::MergePart> parts(3);
  for (int i = 0; i < 3; ++i) {
    results.emplace_back(dtype, rows * features);
    results.emplace_back(Dtype::f32, rows);
  }
  for (int i = 0; i < 3; ++i) {
    parts[i] = {outs[i].data(), lses[i].floats.data(), results[2 + 2 * i].data(), results[3 + 2 * i].floats.data()};
  }
  mmk::MergeAttentionParams p;
  p.rows = static_cast<int64_t>(rows), p.features = static_cast<int64_t>(features), p.parts = 3, p.dtype = dtype;
  p.part = parts.data(), p.out = results[0].data(), p.lse = results[1].floats.data(), p.workers = kAlone;
  k.merge_forward(p);
  p.grad_out = grad_out.data(), p.grad_lse = grad_lse.floats.data();
  k.merge_backward(p);
  return results;
}

Results norm(const Kernels& k, Dtype dtype, int size) {
  generator.seed(size);
  const int64_t batch = 2, length = 1 + size, features = 9 + 7 * size, all = batch * length * features;
  Values x = random_values(dtype, all), shift = random_values(dtype, batch * features);
  Values scale = random_values(dtype, batch * features), grad_out = random_values(dtype, all);
  Values weight = random_values(dtype, features), bias = random_values(dtype, features);
  Results results;
  for (int64_t count : {all, all, batch * features, batch * features, features, features}) {
    results.emplace_back(dtype, static_cast<size_t>(count));
  }
  const auto tokens = [&](Values& v) { return mmk::TokenRows{v.data(), length * features, features}; };
  const auto conditions = [&](Values& v) { return mmk::TokenRows{v.data(), features, 0}; };
  mmk::ModulatedNormParams p;
  p.batch = batch, p.length = length, p.features = features, p.dtype = dtype, p.eps = 1e-2f, p.workers = kAlone;
  p.x = tokens(x), p.out = tokens(results[0]), p.shift = conditions(shift), p.scale = conditions(scale);
  p.weight = weight.data(), p.bias = bias.data();
  k.norm_forward(p);
  p.grad_out = tokens(grad_out), p.grad_x = tokens(results[1]);
  p.grad_shift = conditions(results[2]), p.grad_scale = conditions(results[3]);
  p.grad_weight = results[4].data(), p.grad_bias = results[5].data();
  k.norm_backward(p);
  return results;
}

Results linear(const Kernels& k, Dtype dtype, int size) {
  generator.seed(size);
  const int64_t rows = 3 + 5 * size, widths[2] = {7 + size, 16}, width = widths[0] + widths[1], features = 5 + 3 * size;
  Values weight = random_values(dtype, features * width, 1.f / std::sqrt(static_cast<float>(width)));
  Values bias = random_values(dtype, features), grad_out = random_values(dtype, rows * features);
  std::vector<Values> xs;
  for (int64_t w : widths) xs.push_back(random_values(dtype, rows * w));
  Results results;
  for (int64_t count :
       {rows * features, rows * features, rows * widths[0], rows * widths[1], features * width, features}) {
    results.emplace_back(dtype, static_cast<size_t>(count));
  }
  mmk::ConcatTerm terms[2];
  mmk::ConcatSource sources[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t column = i == 0 ? 0 : widths[0], offset = column * mmk::element_size(dtype);
    terms[i].weight = {static_cast<char*>(weight.data()) + offset, width, false};
    terms[i].grad = static_cast<char*>(results[4].data()) + offset;
    terms[i].grad_stride = width, terms[i].features = features;
    sources[i].x = {xs[i].data(), rows, widths[i], 0};
    sources[i].grad = {results[2 + i].data(), rows, widths[i], 0};
    sources[i].width = widths[i], sources[i].column = column;
    sources[i].terms = &terms[i], sources[i].term_count = 1;
  }
  mmk::ConcatLinearParams p;
  p.sources = {sources, 2, rows, width, features, dtype};
  p.bias = bias.data(), p.activation = mmk::Activation::gelu, p.workers = kAlone;
  p.out = results[0].data(), p.preactivation = results[1].data();
  k.linear_forward(p);
  p.out = nullptr, p.grad_out = {grad_out.data(), rows, features, 0}, p.grad_bias = results[5].data();
  k.linear_backward(p);
  return results;
}

Results attention(const Kernels& k, Dtype dtype, int size) {
  generator.seed(size);
  const int64_t batch = 2, heads = 2, queries = 3 + 6 * size, keys = 5 + 7 * size, dim = 8 + size, value_dim = 4 + size;
  const int64_t rows = batch * heads * queries, key_rows = batch * heads * keys;
  Values query = random_values(dtype, rows * dim), key = random_values(dtype, key_rows * dim);
  Values value = random_values(dtype, key_rows * value_dim), grad_out = random_values(dtype, rows * value_dim);
  Results results;
  for (int64_t count : {rows * value_dim, rows * dim, key_rows * dim, key_rows * value_dim}) {
    results.emplace_back(dtype, static_cast<size_t>(count));
  }
  results.emplace_back(Dtype::f32, static_cast<size_t>(rows));
  Values row_max(Dtype::f32, static_cast<size_t>(rows));
  const auto view = [&](Values& v, int64_t length, int64_t width) {
    return mmk::Rows{v.data(), heads * length * width, length * width, width, nullptr};
  };
  mmk::AttentionParams p;
  p.batch = batch, p.heads = heads, p.kv_heads = heads, p.head_dim = dim, p.value_dim = value_dim, p.dtype = dtype;
  p.query_segments = p.key_segments = 1, p.scale = 1.f / std::sqrt(static_cast<float>(dim)), p.window_right = 0;
  p.bottom_right = true, p.workers = kAlone;
  mmk::QuerySegment& q = p.queries[0];
  q.query = view(query, queries, dim), q.out = view(results[0], queries, value_dim), q.length = queries;
  q.row_max = row_max.floats.data(), q.log_sum = results[4].floats.data();
  p.keys[0].key = view(key, keys, dim), p.keys[0].value = view(value, keys, value_dim), p.keys[0].length = keys;
  k.attention_forward(p);
  q.grad_out = view(grad_out, queries, value_dim), q.grad_query = view(results[1], queries, dim);
  p.keys[0].grad_key = view(results[2], keys, dim), p.keys[0].grad_value = view(results[3], keys, value_dim);
  k.attention_backward(p);
  return results;
}

// The largest difference, in units of the rounding of the largest element in the call's dtype, float32 results of it
// included.
double error(Dtype dtype, const Results& got, const Results& expected) {
  const double unit = dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-9 : 0x1p-12;
  double worst = 0.;
  for (size_t i = 0; i < got.size(); ++i) {
    double largest = 0., difference = 0.;
    for (size_t j = 0; j < got[i].count(); ++j) {
      const double x = got[i].at(j), y = expected[i].at(j);
      if (std::isnan(x) || std::isnan(y)) return HUGE_VAL;
      largest = std::max(largest, std::abs(y)), difference = std::max(difference, std::abs(x - y));
    }
    worst = std::max(worst, difference / (unit * std::max(largest, 1e-3)));
  }
  return worst;
}

}  // namespace

int main() {
  const Kernels baseline = MMK_KERNELS(baseline);
  const struct {
    const char* name;
    Results (*run)(const Kernels&, Dtype, int);
  } ops[] = {{"merge_attention", merge}, {"modulated_norm", norm}, {"concat_linear", linear}, {"attention", attention}};
  const struct {
    const char* name;
    Dtype dtype;
    double most;  // roundings: float32 is summed in other orders, halves differ by a rounding of either side
  } dtypes[] = {{"float32", Dtype::f32, 64.}, {"bfloat16", Dtype::bf16, 8.}, {"float16", Dtype::f16, 8.}};
  int failures = 0, checks = 0;
  for (const Kernels& kernels : {MMK_KERNELS(neon), MMK_KERNELS(neon_bf16)}) {
    if (!mmk::is_runnable(kernels.name)) {
      std::printf("%s: not run by this CPU\n", kernels.name);
      ++failures;
      continue;
    }
    for (const auto& op : ops) {
      for (const auto& dtype : dtypes) {
        double worst = 0.;
        for (int size : {1, 2, 4, 9, 20}) {
          worst = std::max(worst,
                           error(dtype.dtype, op.run(kernels, dtype.dtype, size), op.run(baseline, dtype.dtype, size)));
          ++checks;
        }
        const bool fails = !(worst <= dtype.most);
        failures += fails;
        std::printf("%-9s %-15s %-8s %6.1f roundings%s\n", kernels.name, op.name, dtype.name, worst,
                    fails ? "  FAIL" : "");
      }
    }
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
